"""What a push has staged when it writes the card, with an adapter that is nothing but its header."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from ngrpo_lora.config import RunConfig, load_config
from ngrpo_lora.records.pictures import save_png

FLUX = "black-forest-labs/FLUX.1-dev"
MISS = 'a "red" star\n---\nlicense: mit | two | `x` <b>bold</b> *three* _four_ [a](b) $x$ \\'


def make_config(*overrides: str, path: str = FLUX) -> RunConfig:
    settings = ["model.dtype=bfloat16", "model.height_px=720", "model.width_px=704", "rewards=[hpsv2, pickscore]"]
    return load_config(None, [f"model.path={path}", *settings, *overrides])


def make_folder(folder: Path, config: RunConfig, prompts: list[str], family: str = "flux", **header: object) -> Path:
    """What a push has staged when it writes the card."""
    model = config.model.model_copy(update={"guidance_scale": 3.5, "max_sequence_length": 512})
    rollout = config.rollout.model_copy(update={"shift": 3.1581})
    own = {"family": family, "model": model.model_dump(), "rollout": rollout.model_dump(), **header}
    save_file({"a": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors", {"ngrpo": json.dumps(own)})
    for part in ("first", "last"):
        (folder / "samples" / part).mkdir(parents=True)
        for index, prompt in enumerate(prompts):
            text = {"prompt": prompt, "seed": str(1000 + index)}
            save_png(folder / "samples" / part / f"{index}.png", Image.new("RGB", (8, 8)), text)
    Image.new("RGB", (8, 8)).save(folder / "summary.png")
    for name in ("config.yaml", "evaluation.csv", "pipeline.py"):
        (folder / name).touch()
    return folder
