"""Scores that are kept: of every image, prompt and setting, and no failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from red_samples import IMAGES, NAN, SAMPLES, assert_scores, red

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.scoring import scorer
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.scoring.scorer import BoundReward
from ngrpo_lora.types import Samples


def test_the_cache_asks_once_for_every_image_prompt_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "mine.py"
    path.write_text("")
    asked: list[str] = []

    def score(image, prompt):
        asked.append(prompt)
        return red(image)

    monkeypatch.setattr(scorer, "load_reward", lambda config, device: score)

    def run(samples: Samples = SAMPLES, **settings: Any) -> int:
        asked.clear()
        reward = BoundReward(RewardConfig(name=f"{path}:score", cache=True, **settings), "cpu")
        scores = reward(samples, ScoreCache(tmp_path / "scores.sqlite"))
        assert_scores(scores, *[red(image) for image in samples.images])
        return len(asked)

    assert run() == 6
    assert run() == run(weight=3.0, label="other") == 0
    assert run(Samples(IMAGES, ["a"] * 6, SAMPLES.metadata)) == 3
    assert run(Samples(IMAGES, SAMPLES.prompts, [{"n": 0}] * 6)) == 5
    assert run(Samples([IMAGES[0]], ["a"], [{"n": 0}])) == 0
    assert run(Samples([IMAGES[0].resize((4, 16))], ["a"], [{"n": 0}])) == 1  # the same bytes in another shape
    assert run(range=(0.0, 300.0)) == 6
    path.write_text("# mended\n")
    assert run() == 6


def test_a_picture_in_the_metadata_counts_by_its_pixels(tmp_path: Path):
    cache, config = ScoreCache(tmp_path / "scores.sqlite"), RewardConfig(name="preservation")

    def key(source: Image.Image) -> str:
        return cache.keys(config, Samples([IMAGES[0]], ["a"], [{"source": source}]))[0]

    grey = Image.new("RGB", (4, 4), (9, 9, 9))
    others = [Image.new("RGB", (4, 4), (9, 9, 8)), Image.new("RGB", (2, 8), (9, 9, 9)), Image.new("L", (4, 12), 9)]
    assert key(grey) == key(grey.copy())
    assert len({key(grey), *map(key, others)}) == 4


def test_the_cache_does_not_keep_failures(tmp_path: Path, make_reward: Callable[..., BoundReward]):
    calls = []

    def flaky(image):
        calls.append(1)
        return NAN if len(calls) == 1 else red(image)

    (tmp_path / "mine.py").write_text("")
    reward, cache = make_reward(flaky, cache=True), ScoreCache(tmp_path / "scores.sqlite")
    reward.config = reward.config.model_copy(update={"name": f"{tmp_path}/mine.py:score"})
    assert_scores(reward(SAMPLES[[1, 2]], cache), NAN, 100)
    assert_scores(reward(SAMPLES[[1, 2]], cache), 50, 100)
    assert len(calls) == 3
