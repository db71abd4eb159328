"""What looks on: it sees every step, changes nothing, and may stop the run before any pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FinishedRun, MakeConfig
from runs import Stop, Stopper, assert_same_run, read_rows, resume_and_compare

from ngrpo_lora.records import checkpoints
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.trainer import complete


def test_a_watcher_sees_every_step_and_a_group_of_each(
    finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path
):
    watcher = Stopper()
    run = watcher.watch(make_config(tmp_path, *finished_run.overrides))
    complete(run)
    assert_same_run(tmp_path, finished_run.output_dir)  # it changes nothing
    rows = read_rows(tmp_path)
    assert [{"step": step} | metrics for step, metrics in watcher.steps] == rows
    assert [prompt for prompt, _, _ in watcher.groups] == [run.prompts.prompt(2 * i).text for i in range(4)]
    assert all(images == len(rewards) == 4 for _, images, rewards in watcher.groups)
    samples = 2 * 4  # passes of the transformer, as every micro-batch is a group or fewer
    assert watcher.passes > sum(row["nfe/old_per_sample"] * samples / 4 for row in rows[1:])


@pytest.mark.parametrize(
    ("when", "iterations"),
    [
        pytest.param(lambda run, seen: True, 0, id="evaluation of the base"),
        pytest.param(lambda run, seen: run.iteration == 1, 1, id="rollout"),
        pytest.param(lambda run, seen: run.iteration == 2 and seen.updates == 5, 2, id="between two updates"),
        pytest.param(lambda run, seen: run.iteration == 2, 2, id="evaluation"),
        pytest.param(lambda run, seen: run.iteration == 4, 4, id="last evaluation"),
        pytest.param(lambda run, seen: len(seen.steps) == 5, 4, id="export"),
    ],
)
def test_a_run_stopped_before_any_pass_resumes_bit_for_bit(
    when: Callable[[Run, Stopper], bool],
    iterations: int,
    finished_run: FinishedRun,
    make_config: MakeConfig,
    tmp_path: Path,
):
    watcher = Stopper(when)
    run = watcher.watch(make_config(tmp_path, *finished_run.overrides))
    with pytest.raises(Stop):
        complete(run)
    newest = checkpoints.checkpoints(tmp_path)[-1]
    assert newest.name == f"iteration-{iterations:06d}"
    assert (newest / "pytorch_lora_weights.safetensors").is_file()
    resume_and_compare(finished_run, make_config, tmp_path)


def test_while_a_reward_is_waited_for_the_run_can_be_stopped(make_config: MakeConfig, tmp_path: Path):
    never = threading.Event()
    watcher = Stopper(lambda run, seen: waiting.is_set())
    run, waiting = watcher.watch(make_config(tmp_path)), threading.Event()
    (reward,) = run.scorer.rewards.values()
    score = reward.function

    def hang(images: Any, prompts: Any, metadata: Any) -> Any:
        if run.iteration == 0 and prompts[0] == run.prompts.prompt(1).text:  # that of the last group
            waiting.set()
            never.wait(20)
        return score(images, prompts, metadata)

    reward.function = hang
    start = time.monotonic()
    with pytest.raises(Stop):
        complete(run)
    never.set()
    assert time.monotonic() - start < 15
    assert watcher.groups == []
    assert checkpoints.checkpoints(tmp_path)[-1].name == "iteration-000000"
