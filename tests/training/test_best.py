"""The best evaluation so far, by any of its metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ngrpo_lora.errors import UserError
from ngrpo_lora.training.best import Best

VALUES = [0.5, 0.7, 0.7, None, math.nan, 0.6, 0.8, 0.4]


@pytest.mark.parametrize(("sign", "better"), [("", [0, 1, 6]), ("-", [0, 7])])
def test_only_what_is_better_than_all_before_is_best(sign: str, better: list[int]):
    best = Best(f"{sign}eval/reward_mean")
    assert [i for i, value in enumerate(VALUES) if best.note(i, {"eval/reward_mean": value})] == better
    assert (best.iteration, best.value, best.kept) == (better[-1], VALUES[better[-1]], frozenset(better[-1:]))


def test_a_resumed_run_knows_what_came_before_it():
    rows = [{"step": step, "eval/x": value} for step, value in enumerate([1.0, 3.0, 2.0, 9.0])] + [{"step": 4}]
    best = Best("eval/x")
    best.recall(rows, until=2)
    assert (best.iteration, best.value) == (1, 3.0)
    assert best.note(3, {"eval/x": 3.5})


def test_without_a_metric_nothing_is_best(tmp_path: Path):
    best = Best(None)
    assert not best.note(1, {})
    assert best.kept == frozenset()
    best.write(tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_a_metric_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"must be a metric of evaluations \(eval/a, eval/b\), got 'eval/c'"):
        Best("-eval/c").note(0, {"eval/a": 1, "rollout/x": 1, "eval/b": 2})


def test_the_best_one_is_named_in_a_file(tmp_path: Path):
    best = Best("eval/x")
    best.note(3, {"eval/x": 0.25})
    best.write(tmp_path)
    found = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert found == {"iteration": 3, "metric": "eval/x", "value": 0.25}
