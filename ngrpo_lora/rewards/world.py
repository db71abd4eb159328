"""Graded score of the embedded world's verifier, in [0, 1]: how nearly a picture keeps its caption's promise.

Reads pixels, needs no model. A prompt that describes no scene of the world is an error.
"""

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
    """Graded verdict of every image for its prompt, in [0, 1]: `Verdict.graded`."""
    return [verify(np.asarray(i), parse(p)).graded for i, p in zip(images, prompts, strict=True)]
