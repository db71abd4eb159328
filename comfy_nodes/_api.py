"""What the nodes share: schemas that any ComfyUI takes, pictures in its form, and messages without tracebacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

CATEGORY = "Neighbor GRPO"


def schema(node_id: str, **settings: Any) -> io.Schema:
    """A schema in our category; what this ComfyUI's schemas do not have is left out."""
    known = {field.name for field in fields(io.Schema)}
    kept = {name: value for name, value in settings.items() if name in known}
    return io.Schema(node_id=f"NGRPO_{node_id}", category=CATEGORY, **kept)


def to_images(pictures: Sequence[Image.Image]) -> Tensor:
    """B pictures of one size -> IMAGE (B, H, W, 3) in [0, 1].

    ComfyUI saves `int(255 * x)`: an eighth of a step more than k / 255 keeps every pixel what it is.
    """
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]).astype(np.float32)
    return torch.from_numpy(np.minimum(pixels + 0.125, 255) / 255)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """IMAGE (B, H, W, C) in [0, 1] -> B RGB pictures, the inverse of `to_images`."""
    pixels = (images[..., :3].float().clamp(0, 1) * 255).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels.astype(np.uint8)]
