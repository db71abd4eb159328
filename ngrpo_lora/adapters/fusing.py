"""Adds LoRA files into the frozen base as it is loaded (`model.fuse`), so that what is trained works beside them.

A model that is distilled into few steps is often a LoRA of the whole one (Qwen-Image-Lightning, Hyper-FLUX, Wan's
distilled LoRAs). Fused, it costs nothing in any pass, and the base of an adapter, which the reference term and every
"before" picture are of, is the distilled model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ngrpo_lora.adapters.bases import warn_of_use
from ngrpo_lora.adapters.contents import taken_in
from ngrpo_lora.adapters.finding import HUB_FILE, find_adapter
from ngrpo_lora.adapters.loading import expert_of, read_fitting, said_expert
from ngrpo_lora.adapters.merging import added
from ngrpo_lora.adapters.reading import AdapterFile, check_fusible, read_metadata
from ngrpo_lora.config import Expert, ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.records.files import digest
from ngrpo_lora.world import ADAPTERS

__all__ = ["changed_files", "fuse", "load_fused", "python_lines", "shown"]


def load_fused(model: ModelConfig, parts: Parts = "all", base_is_sharded: bool = False) -> BaseFamily:
    """Load a model's family as `load_family` does, with the files of `model.fuse` in its transformer's weights.

    Raises:
        ConfigError: a file cannot be found.
        UserError: it is no LoRA of this model, or it cannot be added; or as `load_family`.
    """
    files = {name: find_adapter(name, "model.fuse") for name in model.fuse}
    taken = taken_in(model) if files else {}

    def add(family: BaseFamily) -> None:
        for name, path in files.items():
            file = read_fitting(family, path)
            warn_of_use([file], model.path, model.fuse, taken, "give it in model.fuse too")
            fuse(family.transformer_of(expert_of(file, family)), file, model.fuse[name])
            family.fused[name] = digest(path)

    return load_family(model, parts, base_is_sharded, add)


@torch.no_grad()
def fuse(transformer: nn.Module, file: AdapterFile, strength: float) -> None:
    """Add `strength` times a LoRA file that fits into a transformer's weights, each in its own number type.

    Raises:
        UserError: it is no sum of matrices and biases that this model has, or the sum is too large for the type.
    """
    check_fusible(file)
    for name, layer in file.layers.items():
        module = transformer.get_submodule(name)
        changes: dict[str, Tensor | None] = {"weight": layer.delta(), "bias": layer.folded_bias}
        for kind, change in changes.items():
            if change is None:
                continue
            weight = getattr(module, kind)
            if weight is None:
                raise UserError(
                    f"model.fuse {str(file.path)!r} changes the bias of {name!r}, which has none in this model; give a "
                    "LoRA without biases"
                )
            weight.copy_(added(weight, strength * change.to(weight.device), f"{name}.{kind}"))


def changed_files(fused: Mapping[str, str]) -> list[str]:
    """Names of files that a base had taken in and that have changed since.

    Args:
        fused: digests of the files as they were, by their names in `model.fuse`.
    Raises:
        ConfigError: a file cannot be found.
    """
    return [name for name, sha256 in fused.items() if digest(find_adapter(name, "model.fuse")) != sha256]


def python_lines(model: ModelConfig, by_pipeline: bool = True) -> list[str]:
    """Python code that adds the files of `model.fuse` into a diffusers pipeline as `model.fuse` does.

    Args:
        by_pipeline: whether the pipeline has a loader of LoRA files; else its transformer's is called.
    """
    lines = []
    for path, strength in model.fuse.items():
        found = on_hub(path)
        source = ", weight_name=".join(repr(part) for part in found if part) if found else repr(shown(path))
        source = f"ADAPTERS[{path!r}]" if path in ADAPTERS else source
        if not by_pipeline:
            lines += [
                f"pipeline.transformer.load_lora_adapter({source}, use_safetensors=True)",
                f"pipeline.transformer.fuse_lora(lora_scale={strength:g})  # into the base, as in training",
                "pipeline.transformer.unload_lora()",
            ]
            continue
        second = model.expert is not None and fused_into(path) == "low_noise"
        into, parts = (", load_into_transformer_2=True", "['transformer_2'], ") if second else ("", "")
        lines += [
            f"pipeline.load_lora_weights({source}{into})",
            f"pipeline.fuse_lora({parts}lora_scale={strength:g})  # into the base, as in training",
            "pipeline.unload_lora_weights()",
        ]
    return lines


def fused_into(path: str) -> Expert | None:
    """The transformer of a pair that a file of `model.fuse` says it is for; its name alone counts once it is gone."""
    try:
        header = read_metadata(find_adapter(path, "model.fuse"))
    except UserError:
        header = {}
    return said_expert(Path(path).name, header)


def on_hub(path: str) -> tuple[str, str | None] | None:
    """The repository of a name of the Hub and its file, if it names one; None for what is here, or no such name."""
    found = None if Path(path).exists() else re.fullmatch(HUB_FILE, path)
    return found and (found[1], found[2])


def shown(path: str) -> str:
    """A name of the Hub or of the package as it is, and a path without its place on this machine."""
    return path if on_hub(path) or path in ADAPTERS else f"path/to/{Path(path).name}"
