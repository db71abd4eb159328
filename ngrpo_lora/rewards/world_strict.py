"""Strict verdict of the embedded world's verifier: 1 for exactly what the caption promises, else 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ngrpo_lora.world.scenes import parse
from ngrpo_lora.world.verifier import verify

reads = parse
"""What reads a prompt: it raises ValueError for one that is no caption of the world."""

SQUARE = True
"""Pictures must be as high as wide."""


def score(images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    """Strict verdict of every image for its prompt, 0 or 1: `Verdict.strict`."""
    return [float(verify(np.asarray(i), parse(p)).strict) for i, p in zip(images, prompts, strict=True)]
