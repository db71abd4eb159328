"""`ngrpo train`: bad input is found before a model loads, and the trainer gets what was checked."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from commands import refuse
from typer.testing import CliRunner

from ngrpo_lora.cli import app, launching, train
from ngrpo_lora.config import RunConfig, dump_config, load_config
from ngrpo_lora.records.checkpoints import FORMER_FILE
from ngrpo_lora.records.ownership import owned

light = pytest.mark.usefixtures("nothing_heavy")


def test_train_hands_the_checked_config_to_the_trainer(trained: list[RunConfig], tmp_path: Path):
    result = CliRunner().invoke(
        app, ["train", "--num-processes", "1", f"output_dir={tmp_path / 'new' / 'run'}", "seed=5"]
    )
    assert result.exit_code == 0, result.output
    assert [config.seed for config in trained] == [5]
    assert not (tmp_path / "new").exists()  # the trainer makes it


@light
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["rollout.group_szie=3"], "did you mean rollout.group_size?"),
        (["rollout.group_size=1"], "must be at least 2"),
        (["algorithm.num_anchors=13"], "rollout.group_size"),
        (["algorithm.num_train_steps=9"], "rollout.num_steps"),
        (["model.height_px=65"], "multiple of 16"),
        (["demo", "flux"], "an override must look like key=value, got 'flux'"),
        (["nothing.yaml"], "does not exist"),
        (["model.path=./nowhere"], "model.path must be"),
        (["model.path=empty"], "model_index.json"),
        (["prompts.train=none.txt"], "prompts.train"),
        (["prompts.train=blank.txt"], "prompts.train must hold at least one prompt"),
        (["prompts.held_out=latin.txt"], "prompts.held_out must be a UTF-8 text file"),
        (["prompts.train={world:train/color: 2, none.txt: 1}"], "there is no file 'none.txt'"),
        (["prompts.train={world:train/color: 0}"], "prompts.train must be text or at least 1"),
        (["prompts.train=world:train/colour"], "prompts.train must be world:train, world:held_out"),
        (["prompts.train=empty"], "prompts.train must be a file or a dataset, but"),
        (["rewards=my_reward.py:score"], "rewards.train.0.name names the file 'my_reward.py', which does not exist"),
        (["evaluation.measures=a.b:c"], "evaluation.measures.0 names the module 'a.b'"),
        (["evaluation.rewards=a.b:c"], "evaluation.rewards.0.name names the module 'a.b'"),
        (["output_dir=blank.txt"], "output_dir must be a writable folder"),
        (["output_dir=blank.txt/run"], "output_dir must be a writable folder"),
        (["output_dir=held"], "give another output_dir, with lora.init_from=held/adapter"),
        (["output_dir=held", "resume=latest"], "holds none; no checkpoint is left of its run: give another output_dir"),
        (["output_dir=begun", "seed=3"], "without a checkpoint, that has other settings (seed: 0 -> 3); give another"),
        (["resume=latest"], "resume=latest needs a checkpoint"),
        (["resume=runs/x/checkpoints/iteration-000001"], "is none"),
        (["resume=empty"], "is none"),
    ],
)
def test_train_refuses_bad_input_before_anything_loads(
    words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"un caf\xe9\n")
    for name in ("held", "begun"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump_config(load_config(None, [f"output_dir={name}"])))
    (tmp_path / "held" / "adapter").mkdir()
    (tmp_path / "held" / "adapter" / "pytorch_lora_weights.safetensors").touch()
    text = refuse("train", *words)
    assert part in text
    assert not (tmp_path / "runs").exists()


@light
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_train_refuses_a_folder_without_write_permission(tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "output_dir must be a writable folder" in refuse("train", f"output_dir={tmp_path / 'locked'}")


@light
def test_a_missing_8bit_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    result = CliRunner().invoke(
        app, ["train", "--num-processes", "1", "optimizer.name=lion_8bit", f"output_dir={tmp_path / 'run'}"]
    )
    assert result.exit_code == 2
    assert "pip install bitsandbytes" in result.output


# Resume -------------------------------------------------------------------------------------------------------------

RESUMES = ["latest", "run/checkpoints/iteration-000010", "run/checkpoints/iteration-000010/state.pt", "auto"]


def make_run(folder: Path) -> None:
    (folder / "checkpoints" / "iteration-000010").mkdir(parents=True)
    (folder / "checkpoints" / "iteration-000010" / FORMER_FILE).touch()
    (folder / "config.yaml").write_text(dump_config(load_config(None, [f"output_dir={folder}"])))


@light
@pytest.mark.parametrize("resume", RESUMES)
def test_resume_refuses_other_settings_and_names_them(resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    text = refuse("train", f"output_dir={tmp_path / 'run'}", f"resume={resume}", "lora.rank=8", "seed=1", lines=2)
    assert "lora.rank: 16 -> 8" in text
    assert "seed: 0 -> 1" in text


@pytest.mark.parametrize("resume", RESUMES)
def test_resume_may_change_length_and_evaluation(
    resume: str, trained: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    words = [f"resume={resume}", "trainer.num_iterations=900", "trainer.save_every=7", "evaluation.every=3"]
    result = CliRunner().invoke(app, ["train", "--num-processes", "1", f"output_dir={tmp_path / 'run'}", *words])
    assert result.exit_code == 0, result.output
    assert trained[0].trainer.num_iterations == 900


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    resume: str | None, trained: list[RunConfig], tmp_path: Path
):
    words = [f"output_dir={tmp_path}", *([] if resume is None else [f"resume={resume}"])]
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None, words[:1])))
    result = CliRunner().invoke(app, ["train", "--num-processes", "1", *words, "trainer.num_iterations=9"])
    assert result.exit_code == 0, result.output
    assert trained[0].output_dir == str(tmp_path)


@light
def test_a_folder_that_another_process_trains_in_is_refused(tmp_path: Path):
    with owned(tmp_path):
        assert "is in use (process" in refuse("train", f"output_dir={tmp_path}")


# Processes and GPUs -------------------------------------------------------------------------------------------------


@light
def test_the_demo_runs_as_two_processes_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    started: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(launching.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(launching, "launch", lambda count, words, patience_s: started.append((count, words)) or 0)
    result = CliRunner().invoke(app, ["train", "demo", "model.device=cpu", f"output_dir={tmp_path / 'run'}"])
    assert result.exit_code == 0, result.output
    ((count, words),) = started
    assert count == 2
    assert words[1:] == ["-m", "ngrpo_lora", "train", "demo", "model.device=cpu", f"output_dir={tmp_path / 'run'}"]


def test_a_gpu_that_is_too_small_is_told_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The card is made up; the plan is real."""
    importlib.import_module("ngrpo_lora.planning.report")  # libraries look for a card when they are imported
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = load_config("demo", ["model.dtype=float32"])
    for free_gib, told in ((64, False), (0.8, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index, free=free_gib: (int(free * 2**30), 2**33))
        train._advise(config, 1)
        assert ("GiB are free; try " in capsys.readouterr().err) is told


def test_other_steps_than_those_of_the_distillation_are_told_before_training(trained: list[RunConfig], tmp_path: Path):
    words = ["train", "demo-turbo", "--num-processes", "1", f"output_dir={tmp_path / 'run'}"]
    result = CliRunner().invoke(app, [*words, "rollout.num_steps=8", "evaluation.num_steps=16"])
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "embedded-turbo is distilled into 4 steps, but rollout.num_steps is 8 and evaluation.num_steps is 16" in told
    assert told.endswith("give rollout.num_steps=4 evaluation.num_steps=4")
    again = CliRunner().invoke(app, [*words, "rollout.num_steps=4", "evaluation.num_steps=4"])
    assert again.exit_code == 0, again.output
    assert "distilled" not in again.output
    assert len(trained) == 2
