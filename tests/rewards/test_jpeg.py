"""Minus the size as a JPEG, in kB."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.rewards.jpeg import score
from ngrpo_lora.scoring.scorer import BoundReward
from ngrpo_lora.types import Samples

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def test_the_score_is_minus_the_size_of_a_jpeg_of_quality_95_in_kb(tmp_path):
    NOISE.save(tmp_path / "noise.jpg", quality=95)
    assert score([NOISE]) == [-(tmp_path / "noise.jpg").stat().st_size / 1000]


def test_a_flat_image_scores_above_noise():
    flat, noise = score([Image.new("RGB", (64, 64), "red"), NOISE])
    assert -1 < flat < 0
    assert noise < 5 * flat


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_every_size_and_mode_has_a_score(mode: str):
    reward = BoundReward(RewardConfig(name="jpeg"), "cpu")
    scores = reward(Samples([Image.new(mode, size) for size in ((1, 1), (513, 7))], ["", ""], [{}, {}]))
    assert (scores < 0).all()
