"""However a run ends before its time, it goes on bit for bit."""

from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import FinishedRun, MakeConfig
from runs import Stop, Stopper, assert_same_run, read_rows, resume_and_compare
from safetensors.torch import load_file

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.errors import UserError
from ngrpo_lora.records import checkpoints
from ngrpo_lora.training import state, trainer
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete


def test_the_adapter_in_a_checkpoint_is_the_averaged_one(finished_run: FinishedRun):
    """`hub.push: checkpoints` publishes it."""
    folder = checkpoints.checkpoint_dir(finished_run.output_dir, 2)
    saved = checkpoints.load(str(folder), finished_run.output_dir, "cpu")
    tensors = load_file(folder / FILE_NAME)
    assert len(tensors) == len(saved["averaged"])
    differing = 0
    for name, averaged in saved["averaged"].items():
        scale = 2 if ".lora_B" in name else 1  # alpha 8 over rank 4, folded into B
        tensor = tensors[f"transformer.{name.replace('.default', '')}"]
        assert torch.equal(tensor, averaged * scale)
        differing += not torch.equal(tensor, saved["parameters"][name] * scale)
    assert differing == len(tensors)


def test_a_killed_run_resumes_bit_for_bit(
    finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed in iteration 4: one line after its checkpoint, and in the middle of the next."""
    run = prepare(make_config(tmp_path, *finished_run.overrides))
    update = trainer.update

    def killed(*args: Any) -> Any:
        if run.iteration == 3:
            raise KeyboardInterrupt
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", killed)
        patch.setattr(trainer, "checkpoint_on_error", nullcontext)  # which a kill leaves no time for
        with pytest.raises(KeyboardInterrupt):
            complete(run)
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2, 3]
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["iteration-000002"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/rew')
    resume_and_compare(finished_run, make_config, tmp_path)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_iteration_and_the_run_resumes_bit_for_bit(
    name: str, finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, asking = prepare(make_config(tmp_path, *finished_run.overrides)), signal.Signals[name]
    update, handler = trainer.update, signal.getsignal(asking)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", lambda *args: (signal.raise_signal(asking), update(*args))[1])
        with pytest.raises(UserError, match="stopped after iteration 1 of 4; go on with resume=latest"):
            complete(run)
    assert signal.getsignal(asking) is handler
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["iteration-000001"]
    resume_and_compare(finished_run, make_config, tmp_path)


def test_sigusr1_saves_and_the_run_goes_on(
    finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = prepare(make_config(tmp_path, *finished_run.overrides))
    update, handler = trainer.update, signal.getsignal(signal.SIGUSR1)

    def save_once(*args: Any) -> Any:
        if run.iteration == 0:
            signal.raise_signal(signal.SIGUSR1)
        return update(*args)

    monkeypatch.setattr(trainer, "update", save_once)
    complete(run)
    assert signal.getsignal(signal.SIGUSR1) is handler
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [f"iteration-{step:06d}" for step in (1, 2, 4)]
    assert_same_run(tmp_path, finished_run.output_dir)


def test_a_time_limit_stops_the_run_with_a_checkpoint(make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path, "trainer.max_hours=0.0001"))
    with pytest.raises(UserError, match=r"stopped after iteration 1 of 2 \(trainer.max_hours\); go on with resume"):
        complete(run)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["iteration-000001"]


def test_the_best_checkpoint_stays_also_after_a_resume(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values, evaluate = [0.1, 0.3, 0.9, 0.2, 0.5], trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda run: evaluate(run) | {"eval/reward_mean": values[run.iteration]})
    words = ("trainer.keep_best=eval/reward_mean", "trainer.keep_checkpoints=1", "evaluation.every=1")
    for iterations, kept in ((3, (2, 3)), (4, (2, 4))):
        resume = ["resume=latest"] if iterations == 4 else []
        complete(prepare(make_config(tmp_path, *words, f"trainer.num_iterations={iterations}", *resume)))
        assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [f"iteration-{n:06d}" for n in kept]
        best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
        assert best == {"iteration": 2, "metric": "eval/reward_mean", "value": 0.9}


def test_going_back_leaves_no_trace_of_what_came_later(
    finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path
):
    copytree(finished_run.output_dir, tmp_path, dirs_exist_ok=True)
    middle = checkpoints.checkpoint_dir(tmp_path, 2)
    prepare(make_config(tmp_path, *finished_run.overrides, f"resume={middle}"))
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["iteration-000002"]
    assert max(int(path.stem) for path in (tmp_path / "evaluations").glob("*.jsonl")) <= 2
    complete(prepare(make_config(tmp_path, *finished_run.overrides, f"resume={middle}")))
    assert_same_run(tmp_path, finished_run.output_dir)
    assert "resume: null" in (tmp_path / "config.yaml").read_text()


def test_a_second_ctrl_c_stops_at_once_with_a_checkpoint(
    finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = prepare(make_config(tmp_path, *finished_run.overrides))
    update = trainer.update

    def twice(*args: Any) -> Any:
        if run.iteration == 1:
            run.lora_step.optimizer.register_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT))
        return update(*args)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has not
    try:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "update", twice)
            with pytest.raises(KeyboardInterrupt):
                complete(run)
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoints.checkpoints(tmp_path)[-1].name == "iteration-000001"
    resume_and_compare(finished_run, make_config, tmp_path)


def test_an_error_is_raised_where_no_checkpoint_can_be_written(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Stopper(lambda run, seen: run.iteration == 1).watch(make_config(tmp_path))
    monkeypatch.setattr(state, "save", lambda run: 1 / 0)
    with pytest.raises(Stop):
        complete(run)


def test_a_checkpoint_of_another_rank_is_refused(finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path):
    middle = checkpoints.checkpoint_dir(finished_run.output_dir, 2)
    with pytest.raises(UserError, match="the checkpoint's adapter has other layers or another rank"):
        prepare(make_config(tmp_path, *finished_run.overrides, "lora.rank=2", f"resume={middle}"))
