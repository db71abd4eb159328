"""When an iteration is the last one, and what belongs to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import FinishedRun


@pytest.mark.parametrize(
    ("iteration", "evaluated", "saved"),
    [(0, True, True), (1, False, False), (2, False, True), (3, True, False), (4, False, True), (5, True, False)],
)
def test_evaluations_and_checkpoints_are_due_in_turn_and_an_evaluation_at_the_end(
    iteration: int, evaluated: bool, saved: bool, finished_run: FinishedRun
):
    config = finished_run.run.config
    trainer = config.trainer.model_copy(update={"num_iterations": 5, "save_every": 2})
    evaluation = config.evaluation.model_copy(update={"every": 3})
    config = config.model_copy(update={"trainer": trainer, "evaluation": evaluation})
    run = replace(finished_run.run, config=config, iteration=iteration)
    assert (run.evaluation_due, run.save_due, run.is_complete) == (evaluated, saved, iteration == 5)


def test_one_process_has_all_groups_and_the_whole_base(finished_run: FinishedRun):
    run = finished_run.run
    assert run.groups == range(run.config.rollout.prompts_per_iteration)
    sharded = run.config.model_copy(update={"trainer": run.config.trainer.model_copy(update={"strategy": "fsdp"})})
    assert not replace(run, config=sharded).base_is_sharded
