"""Vividness: saturation, whatever the prompt."""

from __future__ import annotations

import pytest
from PIL import Image

from ngrpo_lora.bench.paper.vividness import score
from ngrpo_lora.config import RewardConfig


def test_grey_is_0_pure_colour_is_1_and_half_of_it_a_half():
    half = Image.new("RGB", (4, 2), "gray")
    half.paste("red", (0, 0, 2, 2))
    grey, red, both = score([Image.new("RGB", (4, 2), "gray"), Image.new("RGB", (4, 2), "red"), half])
    assert grey == 0
    assert red == 1
    assert both == pytest.approx(0.5)


def test_its_name_in_metrics_is_the_files():
    assert RewardConfig(name="ngrpo_lora.bench.paper.vividness:score").key == "vividness"
