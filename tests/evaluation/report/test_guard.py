"""What a healthy run would not show is told on the screen while it goes, each kind once."""

from __future__ import annotations

import json
import logging

import pytest

from ngrpo_lora.evaluation.report.guard import Guard
from ngrpo_lora.evaluation.report.record import Record
from ngrpo_lora.training.watcher import Start


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture):
    """Follows a run from its start on, and gives what was said at which step."""

    def follow(record: Record, resumed: int = 0, is_main: bool = True) -> list[str]:
        path = record.folder / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in record.rows if row["step"] <= resumed and resumed))
        guard = Guard()
        guard.before_start(Start(record.config, resumed, 1, is_main, 1, 1))
        with caplog.at_level(logging.WARNING):
            for row in record.rows:
                if row["step"] > resumed or not resumed:
                    guard.after_step(row["step"], {key: value for key, value in row.items() if key != "step"})
        return caplog.messages

    return follow


def test_a_healthy_run_is_not_spoken_of(write_run, told):
    assert told(write_run()) == []


def test_flat_groups_are_told_once_as_soon_as_five_iterations_have_them(write_run, told):
    (line,) = told(write_run(rollout__zero_spread_share=1.0))
    assert line.startswith("iteration 5: All groups are flat")


def test_two_kinds_are_told_and_a_run_of_several_processes_speaks_with_one_voice(write_run, told):
    record = write_run(policy__clip_fraction=0.9, policy__max_abs_log_ratio=3.0)
    assert told(record, is_main=False) == []
    assert [line[:30] for line in told(record)] == [
        "iteration 5: Most of the loss ",
        "iteration 5: The policy runs a",
    ]


def test_a_resumed_run_is_judged_by_all_its_iterations(write_run, told):
    (line,) = told(write_run(policy__clip_fraction=0.9), resumed=8)
    assert line.startswith("iteration 9: Most of the loss is clipped (90%)")


def test_a_watched_reward_that_falls_is_told_at_the_evaluation_that_shows_it(write_run, told):
    (line,) = told(write_run(watched=-2.0))
    assert line.startswith("iteration 10: The trained reward rises while world_manifold gets worse, by -2 ")
