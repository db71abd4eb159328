"""The best evaluation so far, by any of its metrics."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
from conftest import MakeConfig
from runs import read_rows

from ngrpo_lora.config import TrainerConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.training.best import Best, ended_early
from ngrpo_lora.training.trainer import train

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


@pytest.mark.parametrize(("patience", "ended_after"), [(1, 2), (2, 3), (3, 4), (4, 5), (5, None), (None, None)])
def test_patience_counts_evaluations_in_a_row_that_are_no_better(patience: int | None, ended_after: int | None):
    best, ended = Best("eval/reward_mean", patience), []
    for i, value in enumerate(VALUES[:6]):
        best.note(i, {"eval/reward_mean": value})
        ended.append(best.is_out_of_patience)
    assert (ended.index(True) if True in ended else None) == ended_after


def test_the_metrics_of_a_run_tell_whether_it_ended_early():
    rows = [{"step": step, "eval/x": value} for step, value in enumerate([1.0, 3.0, 2.0, 2.5])] + [{"step": 4}]
    early = TrainerConfig(keep_best="eval/x", early_stopping_patience=2)
    assert ended_early(early, rows)
    assert not ended_early(early, rows[:3])
    assert not ended_early(TrainerConfig(keep_best="eval/x"), rows)


def test_a_run_ends_early_and_goes_on_with_more_patience(make_config: MakeConfig, tmp_path: Path, caplog):
    """The reward falls with every call."""
    (tmp_path / "fading.py").write_text(
        "calls = []\n"
        "def score(images, prompts, metadata):\n"
        "    calls.append(len(images))\n"
        "    return [i / 10 - len(calls) for i in range(len(images))]\n"
    )
    settings = [
        f"rewards={tmp_path / 'fading.py'}:score",
        "trainer.num_iterations=6",
        "trainer.save_every=1",
        "trainer.keep_best=eval/reward_mean",
        "evaluation.every=1",
    ]
    config = make_config(tmp_path / "run", *settings, "trainer.early_stopping_patience=2")
    with caplog.at_level(logging.INFO):
        train(config)
    assert "ended early, at iteration 2: eval/reward_mean was best" in caplog.text
    assert "the best adapter: none" in caplog.text
    assert (tmp_path / "run" / "adapter").is_dir()
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1, 2]
    train(make_config(tmp_path / "run", *settings, "trainer.early_stopping_patience=2", "resume=latest"))
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1, 2]
    train(make_config(tmp_path / "run", *settings, "trainer.early_stopping_patience=4", "resume=latest"))
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_patience_without_a_metric_is_refused():
    with pytest.raises(ValueError, match="trainer.keep_best must name a metric .* got null; for example"):
        TrainerConfig(early_stopping_patience=2)
