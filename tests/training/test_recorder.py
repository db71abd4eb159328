"""What a run has left in its folder at every moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import FinishedRun
from runs import read_rows

from ngrpo_lora.config import load_config
from ngrpo_lora.training.recorder import Recorder
from ngrpo_lora.training.run import Run


@pytest.fixture
def run(finished_run: FinishedRun, tmp_path: Path) -> Run:
    """A run with nothing in its folder yet."""
    config = finished_run.run.config.model_copy(update={"output_dir": str(tmp_path)})
    return replace(finished_run.run, config=config, iteration=0)


def test_the_configuration_is_there_from_the_start_and_a_line_before_its_evaluation(run: Run, tmp_path: Path):
    recorder = Recorder()
    recorder.before_start(run.start())
    assert load_config(tmp_path / "config.yaml") == run.config
    assert read_rows(tmp_path) == []
    recorder.after_step(0, {"eval/reward_mean": 0.5})
    recorder.after_update(1, {"lora/grad_norm": 2.0})
    assert read_rows(tmp_path) == [{"step": 0, "eval/reward_mean": 0.5}, {"step": 1, "lora/grad_norm": 2.0}]
    recorder.after_step(1, {"lora/grad_norm": 2.0, "eval/reward_mean": 0.75})
    assert read_rows(tmp_path)[1:] == [{"step": 1, "lora/grad_norm": 2.0, "eval/reward_mean": 0.75}]


def test_a_resumed_run_drops_the_lines_after_its_checkpoint_and_a_new_one_all(run: Run, tmp_path: Path):
    recorder = Recorder()
    recorder.before_start(run.start())
    for step in range(4):
        recorder.after_step(step, {})
    resumed = replace(run, config=run.config.model_copy(update={"resume": "latest"}), iteration=2)
    Recorder().before_start(resumed.start())
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2]
    Recorder().before_start(run.start())
    assert read_rows(tmp_path) == []
