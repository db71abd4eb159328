"""How much fine detail pictures have: what blur takes away, and noise adds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

LOWEST = 0.25
"""Cycles a pixel from which detail is fine: the upper half of what a grid of pixels can hold."""


def sharpness(images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
    """Measure the detail of pictures, whatever they show.

    Args:
        images: N RGB pictures.
        prompts: N captions, which are not read.
    Returns:
        fine_detail: RMS of what is left of a picture's luminance without its frequencies below `LOWEST` in any
            direction, of 255; the mean over pictures.
    """
    return {"fine_detail": float(np.mean([fine_detail(image) for image in images]))}


def fine_detail(image: Image.Image) -> float:
    """RMS of the part of a picture's luminance that has `LOWEST` cycles a pixel or more, of 255."""
    luminance = np.asarray(image.convert("L"), dtype=np.float64)
    rows, columns = (np.fft.fftfreq(size) for size in luminance.shape)
    spectrum = np.fft.fft2(luminance) * (np.hypot(rows[:, None], columns) >= LOWEST)
    return float(np.linalg.norm(spectrum) / luminance.size)
