"""Fine detail of pictures whose spectrum is known, and of rendered ones that are blurred or noisy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ngrpo_lora.world.scenes import TASKS, all_scenes, render
from ngrpo_lora.world.sharpness import fine_detail, sharpness


def waves(*shares: tuple[float, float], height: int = 48) -> Image.Image:
    """Waves along x of an amplitude and cycles a pixel each, about a grey of 128."""
    x = np.arange(64)
    row = 128 + sum(amplitude * np.cos(2 * math.pi * cycles * x) for amplitude, cycles in shares)
    return Image.fromarray(np.tile(np.round(row).astype(np.uint8), (height, 1))).convert("RGB")


def test_a_wave_counts_by_its_rms_from_a_quarter_of_a_cycle_a_pixel_on():
    assert fine_detail(waves((40, 3 / 8))) == pytest.approx(40 / math.sqrt(2), rel=0.02)
    assert fine_detail(waves((40, 1 / 4))) == pytest.approx(40 / math.sqrt(2), rel=0.02)
    assert fine_detail(waves((60, 1 / 8))) < 0.3  # rounding to whole numbers
    assert fine_detail(waves((60, 1 / 8), (40, 3 / 8), height=64)) == pytest.approx(40 / math.sqrt(2), rel=0.02)
    turned = waves((40, 3 / 8)).transpose(Image.Transpose.ROTATE_90)
    assert fine_detail(turned) == pytest.approx(fine_detail(waves((40, 3 / 8))))


def test_blur_takes_detail_away_and_noise_adds_some():
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(render(scene, rng)) for task in TASKS for scene in all_scenes(task)[:10]]
    noise = [np.asarray(picture) + rng.normal(0, 6, (64, 64, 3)) for picture in pictures]
    noisy = [Image.fromarray(pixels.clip(0, 255).astype(np.uint8)) for pixels in noise]
    blurred = [picture.filter(ImageFilter.GaussianBlur(0.7)) for picture in pictures]
    plain, less, more = (sharpness(some, [])["fine_detail"] for some in (pictures, blurred, noisy))
    assert plain == pytest.approx(np.mean([fine_detail(picture) for picture in pictures]))
    assert less < 0.6 * plain
    assert more > 1.1 * plain
