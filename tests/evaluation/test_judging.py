"""Rewards that judge pictures: how they are given, and where they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pictures import paint
from PIL import Image

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation import judging
from ngrpo_lora.records.pictures import Picture, collect
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


def test_scored_pictures_have_the_sources_that_their_metadata_name(tmp_path: Path):
    """By a path that counts from their folder; where there is no such file it is text, but for rewards of edits."""
    folder, grey, black = tmp_path / "edited", Image.new("RGB", (64, 40), (51,) * 3), Image.new("RGB", (64, 40))
    folder.mkdir()
    grey.save(folder / "a.png")
    black.save(tmp_path / "before.png")
    line = {"file_name": "a.png", "prompt": "lighter", "source": "../before.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(line | {"mask": "coco.png"}))
    (picture,) = collect([folder])
    seen = judging.shown(picture, (32, 32))
    assert (seen["source"].size, seen["mask"]) == ((32, 32), "coco.png")
    rewards = judging.parse_rewards(["preservation"])
    with pytest.raises(ConfigError, match="--reward preservation must have .* 'coco.png' .line 1 of"):
        judging.score_pictures([picture], rewards, tmp_path)
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    (picture,) = collect([folder])
    judging.score_pictures([picture], rewards, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text())["pictures"][0]["preservation"] == pytest.approx(0.8)
    (tmp_path / "before.png").unlink()
    with pytest.raises(ConfigError, match=r"'../before.png' .line 1 of .*jsonl'. is no file .*; correct the path"):
        judging.score_pictures([picture], rewards, tmp_path)


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
