"""Minus the distance of a picture of the embedded world from what its renderer can draw, of 255; 0 is none.

Reads pixels, needs no model and no prompt. Made to be watched in `evaluation.rewards`: it falls where a tuned model
pleases the verifier with pictures that are blurred, blotchy or noisy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ngrpo_lora.world.manifold import distance

SQUARE = True
"""Pictures must be as high as wide."""


def score(images: Sequence[Image.Image]) -> list[float]:
    """Scores of B images: each one's distance from what the renderer can draw, with a minus sign."""
    return [-distance(np.asarray(image)) for image in images]
