"""Pictures side by side: which is best, what stands below, and the table."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ngrpo_lora import rewards
from ngrpo_lora.config import RewardConfig
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.contest import Contest, check_prompt, check_source
from ngrpo_lora.evaluation.ranking import Ranking

COLORS = ["red", "green", "blue", "white", "black", "gray"]
PICTURES = [Image.new("RGB", (16, 16), color) for color in COLORS]
GREEN = (26, 156, 63)


def contest(totals: list[float], **rewards: list[float]) -> Contest:
    order = sorted(range(6), key=lambda place: -totals[place])
    return Contest(
        ["base", "mine", "mine x 0.5"], [7, 8], PICTURES, Ranking(order, totals, rewards or {"r": totals}, [])
    )


@pytest.mark.parametrize(
    ("totals", "best"),
    [
        ([1, 2, 3, 6, 5, 4], {2, 3}),
        ([1, 2, 2, 0, 0, 0], {1, 2}),
        ([1, 1.0001, 1.0002, 0, 1, 0], {4}),  # the first row shows 1.000 three times
        ([math.nan, 2, 1, math.nan, math.nan, math.nan], {1}),
        ([math.nan, 2, math.nan, -1, -2, -3], {3}),
    ],
)
def test_the_best_of_a_row_is_what_nothing_beats_in_what_is_shown(totals: list[float], best: set[int]):
    assert contest(totals).best() == best


def test_each_cell_holds_its_picture_and_the_best_a_frame():
    grid = contest([1, 2, 3, 6, 5, 4]).grid(160)
    assert grid.width == 3 * 160
    for place, color in enumerate(COLORS):
        left, top = place % 3 * 160, place // 3 * (grid.height // 2)
        assert grid.getpixel((left + 80, top + 80)) == Image.new("RGB", (1, 1), color).getpixel((0, 0))
        assert (grid.getpixel((left + 80, top + 1)) == GREEN) == (place in (2, 3))
        assert np.asarray(grid.crop((left, top + 162, left + 160, top + 210))).min() < 80  # letters


def test_long_names_are_not_cut():
    one = Contest(["a-very-long-name-of-an-adapter-that-needs-two-lines x 0.5"], [7], PICTURES[:1])
    other = Contest(["short"], [7], PICTURES[:1])
    assert one.grid(160).height > other.grid(160).height


def test_the_table():
    lines = contest([1, 2, 3, 6, 5, 4], a=[1, 2, 3, 6, 5, 4], b=[0, 0, 0, 0, 0, math.nan]).table().splitlines()
    assert lines[0] == "| seed | drawn with | total | a | b |  |"
    assert lines[4] == "| 7 | mine x 0.5 | 3.000 | 3.000 | 0.000 | best |"
    assert lines[7] == "| 8 | mine x 0.5 | 4.000 | 4.000 | failed |  |"
    assert lines[8].startswith("| mean (95% CI) | base | 3.500 [")
    assert any(line.startswith("| mine | base | a | 3.500 | 3.500 | +0.000 [") for line in lines)


def test_a_table_of_one_seed_has_no_intervals():
    ranking = Ranking([1, 0], [1.0, 2.0], {"r": [1.0, 2.0]}, ["reward r failed"])
    lines = Contest(["base", "mine"], [7], PICTURES[:2], ranking).table().splitlines()
    assert lines == [
        "| seed | drawn with | r |  |",
        "| --- | --- | --- | --- |",
        "| 7 | base | 1.000 |  |",
        "| 7 | mine | 2.000 | best |",
        "",
        "reward r failed",
    ]


def test_without_rewards_nothing_is_best():
    one = Contest(["base", "mine"], [7], PICTURES[:2])
    assert one.best() == set()
    assert one.table() == "not judged; seeds 7; base, mine"
    one.grid()


def test_a_reward_that_needs_the_prompt_must_have_it():
    check_prompt([RewardConfig(name="jpeg")], "")
    check_prompt([RewardConfig(name="world")], "a star")
    with pytest.raises(ConfigError, match="reward world needs the prompt, got none"):
        check_prompt([RewardConfig(name="jpeg"), RewardConfig(name="world")], " ")


def test_edits_have_their_source_first_in_every_row():
    source = Image.new("RGB", (16, 16), "yellow")
    one = contest([1, 2, 3, 6, 5, 4])
    grid = Contest(one.columns, one.seeds, one.pictures, one.ranking, source).grid(160)
    assert grid.width == 4 * 160
    for place, color in enumerate(["yellow", *COLORS[:3], "yellow", *COLORS[3:]]):
        left, top = place % 4 * 160, place // 4 * (grid.height // 2)
        assert grid.getpixel((left + 80, top + 80)) == Image.new("RGB", (1, 1), color).getpixel((0, 0))
        assert (grid.getpixel((left + 80, top + 1)) == GREEN) == (place in (3, 5))


def test_a_reward_of_edits_needs_the_source():
    plain = [RewardConfig(name="jpeg"), RewardConfig(name="judge"), RewardConfig(name="mine.py:score")]
    check_source(plain, False)
    for name in ("world_edit", "world_edit_strict", "preservation", "clip_directional"):
        check_source([*plain, RewardConfig(name=name)], True)
        with pytest.raises(ConfigError, match=f"reward {name} needs the source picture, got none; connect what"):
            check_source([*plain, RewardConfig(name=name)], False)


def test_every_reward_that_asks_for_a_source_says_so():
    folder = Path(rewards.__file__).parent
    asks = {file.stem for file in folder.glob("[!_]*.py") if "rewards._edits import" in file.read_text("utf-8")}
    says = {file.stem for file in folder.glob("[!_]*.py") if "NEEDS_SOURCE = True" in file.read_text("utf-8")}
    assert asks | {"clip_directional"} == says
