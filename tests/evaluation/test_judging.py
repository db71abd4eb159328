"""Rewards that judge pictures: how they are given, and where they fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import paint

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation import judging
from ngrpo_lora.records.pictures import Picture
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.scoring.scorer import Scorer


def test_rewards_are_given_by_name_or_as_mappings():
    found = judging.parse_rewards(["world", "{name: world_strict, weight: 1e-1, cache: true}"])
    assert [(reward.key, reward.weight, reward.cache) for reward in found] == [
        ("world", 1.0, False),
        ("world_strict", 0.1, True),
    ]


@pytest.mark.parametrize(
    ("texts", "part"),
    [
        (["wrld"], "--reward name must be one of .*'wrld'; did you mean world"),
        (["{name: world, wieght: 2}"], "--reward unknown key wieght; did you mean weight"),
        (["world", "world"], "--reward must name each reward once, got world twice"),
        (["gone.py:score"], "--reward names the file 'gone.py', which does not exist"),
        (["{name: world"], "--reward .*must be a YAML value"),
    ],
)
def test_a_bad_reward_is_named(texts: list[str], part: str):
    with pytest.raises(ConfigError, match=part):
        judging.parse_rewards(texts)


def test_a_reward_that_fails_for_every_picture_is_an_error(tmp_path: Path):
    (tmp_path / "broken.py").write_text("def score(images):\n    raise RuntimeError('no such judge')\n")
    configs = judging.parse_rewards([f"{tmp_path}/broken.py:score"])
    with pytest.raises(UserError, match="reward broken failed for all 1 pictures"):
        judging.score_pictures([Picture(paint(tmp_path / "a.png", 0, 0, 0))], configs, tmp_path)


def test_groups_stay_whole_however_many_pictures_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "spread.py").write_text("def score(images, prompt):\n    return [len(images)] * len(images)\n")
    monkeypatch.setattr(judging, "IN_MEMORY", 4)
    picture = Picture(paint(tmp_path / "a.png", 0, 0, 0), "p")
    spread = Scorer(judging.parse_rewards([f"{tmp_path}/spread.py:score"]))
    kept = ScoreCache(tmp_path / "scores.sqlite")
    assert judging.judge(spread, [picture] * 9, kept, "pictures", 3) == {"spread": [3.0] * 9}
