"""JPEG compressibility: minus the size of the image as a JPEG of quality 95, in kB (1000 bytes).

A toy reward without a model, for checking that a trainer learns: compressible images are smooth and flat. A negative
weight rewards incompressibility. Source: DDPO (arXiv 2305.13301), section 5.1; Flow-GRPO divides it by 500.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image


def score(images: Sequence[Image.Image]) -> list[float]:
    """Minus the size in kB of every image as a JPEG; it grows with the pixels, so compare images of one size."""
    return [-_jpeg_bytes(image) / 1000 for image in images]


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.tell()
