"""Text embeddings on disk, made before a run, so that text encoders and transformer are never loaded together.

This is `model.text_encoders: cache`: one safetensors file a prompt, named by the digest of prompt and encoder settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.devices import release_memory, resolve_device, resolve_dtype
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.prompts.files import Prompt, as_prompt
from ngrpo_lora.records.files import written
from ngrpo_lora.types import TextEmbeds

__all__ = ["EmbeddingCache"]

DECIDING = ("path", "revision", "dtype", "max_sequence_length", "negative_prompt")


class EmbeddingCache:
    """A folder with the conditionings of prompts, one safetensors file each."""

    def __init__(self, folder: Path, model: ModelConfig):
        self.folder = folder
        dtype = resolve_dtype(model.dtype, resolve_device(model.device))
        # What else decides of an edit: the size of its source, whether the negative prompt is encoded beside it, and
        # of a video how many frames follow the source.
        self.of_edits = f"{model.width_px}x{model.height_px}, {model.guidance_scale}"
        self.of_edits += "" if model.num_frames is None else f", {model.num_frames} frames"
        self.settings = json.dumps([model.model_copy(update={"dtype": dtype}).model_dump()[key] for key in DECIDING])

    def file(self, prompt: str | Prompt) -> Path:
        """Path of the file for a prompt's conditioning, whether it exists yet or not."""
        prompt = as_prompt(prompt)
        settings = self.settings if prompt.source is None else self.settings + self.of_edits
        digest = hashlib.sha256(f"{settings}\x1f{prompt.condition}".encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    def missing(self, prompts: Sequence[str | Prompt]) -> list[str | Prompt]:
        """The prompts that are not encoded yet, each once."""
        by_file: dict[Path, str | Prompt] = {}
        for prompt in prompts:
            by_file.setdefault(self.file(prompt), prompt)
        return [prompt for file, prompt in by_file.items() if not file.is_file()]

    def fill(self, family: BaseFamily, prompts: Sequence[str | Prompt]) -> None:
        """Encode the missing prompts, one at a time, and free the text encoders."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), family.awake():
            for prompt in self.missing(prompts):
                tensors = {
                    name: tensor.cpu().contiguous() for name, tensor in family.encode_one(as_prompt(prompt)).items()
                }
                with written(self.file(prompt)) as partial:
                    save_file(tensors, partial)
        family.release_encoders()
        release_memory()

    def encode(self, prompts: Sequence[str | Prompt], device: torch.device) -> TextEmbeds:
        """The conditioning of prompts from disk, as `BaseFamily.encode` gives it."""
        wanted = [self.file(prompt) for prompt in prompts]
        alone = {file: load_file(file) for file in dict.fromkeys(wanted)}
        return TextEmbeds.join([alone[file] for file in wanted]).to(device)
