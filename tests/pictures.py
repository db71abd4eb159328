"""Pictures of one colour, and their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ngrpo_lora.records.pictures import save_png

COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200), (90, 90, 90), (0, 0, 0)]


def solid(color: tuple[int, int, int], width_px: int = 64, height_px: int = 64) -> Image.Image:
    return Image.new("RGB", (width_px, height_px), color)


def paint(path: Path, *color: int, size: tuple[int, int] = (8, 8), **text: str) -> Path:
    """A PNG file of one colour, with text chunks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, Image.new("RGB", size, color), text)
    return path


def pixels(path: str | Path) -> np.ndarray:
    """(H, W, 3) of a file, as numbers that may be subtracted."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)
