"""Preservation: figures that are known, and what a mask and the share without one leave to be compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
from PIL import Image

from ngrpo_lora.config import parse_config
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.rewards.preservation import Reward

SIZE = (8, 4)


def flat(level: int, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.new("RGB", size, (level,) * 3)


def left_half(inside: Any, outside: Any, mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, SIZE, outside)
    image.paste(inside, (0, 0, SIZE[0] // 2, SIZE[1]))
    return image


def score(image: Image.Image, **metadata: Any) -> float:
    settings = {"kept_share": metadata.pop("kept_share")} if "kept_share" in metadata else {}
    (config,) = parse_config({"rewards": {"train": [{"name": "preservation", **settings}]}}).rewards.train
    return Reward(config, "cpu")([image], [metadata])[0]  # pyright: ignore[reportArgumentType]


def test_all_pixels_count_by_their_difference():
    assert score(flat(51), source=flat(51), kept_share=1) == 1
    assert score(flat(0), source=flat(255), kept_share=1) == 0
    assert score(flat(51), source=flat(0), kept_share=1) == pytest.approx(0.8)
    assert score(flat(0), source=flat(51), kept_share=1) == pytest.approx(0.8)  # in either direction
    red = Image.new("RGB", SIZE, (255, 0, 0))
    assert score(red, source=flat(0), kept_share=1) == pytest.approx(2 / 3)


def test_without_a_mask_the_pixels_that_changed_least_count():
    edited = left_half((255,) * 3, (51,) * 3)
    assert score(edited, source=flat(0)) == pytest.approx(0.8)
    assert score(edited, source=flat(0), kept_share=0.25) == pytest.approx(0.8)
    assert score(edited, source=flat(0), kept_share=1) == pytest.approx(1 - 0.6)
    assert score(edited, source=flat(0), kept_share=0.75) == pytest.approx(1 - (0.2 * 16 + 1.0 * 8) / 24)


def test_a_mask_says_which_pixels_were_to_stay():
    edited, black = left_half((255,) * 3, (51,) * 3), flat(0)
    assert score(edited, source=black, mask=left_half(255, 0, "L")) == pytest.approx(0.8)
    assert score(edited, source=black, mask=left_half((0,) * 3, (255,) * 3)) == 0  # RGB, as it travels
    assert score(edited, source=black, mask=left_half(127, 128, "L")) == 0  # half is white
    assert score(edited, source=black, mask=flat(0)) == pytest.approx(0.4)
    assert math.isnan(score(edited, source=black, mask=flat(255)))


def test_a_picture_of_any_mode_is_compared():
    edited = left_half((255,) * 3, (51,) * 3)
    assert score(edited.convert("L"), source=flat(0).convert("CMYK")) == pytest.approx(0.8, abs=0.01)


def test_each_picture_has_its_own_source():
    (config,) = parse_config({"rewards": {"train": ["preservation"]}}).rewards.train
    reward = Reward(config, "cpu")  # pyright: ignore[reportArgumentType]
    assert reward([flat(0), flat(0)], [{"source": flat(0)}, {"source": flat(255)}]) == [1, 0]


@pytest.mark.parametrize("metadata", [{}, {"source": "a.png"}])
def test_a_prompt_without_a_source_is_an_error(metadata: dict[str, Any]):
    with pytest.raises(UserError, match="reward preservation needs the source picture of every prompt"):
        score(flat(0), **metadata)


@pytest.mark.parametrize("share", [0, 1.1, "much"])
def test_a_share_is_above_0_and_at_most_1(share: Any):
    with pytest.raises(ConfigError, match="kept_share"):
        score(flat(0), source=flat(0), kept_share=share)
