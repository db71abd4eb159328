"""The command: exit status, messages, and that bad input is found before torch or a model loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import ngrpo_lora
from ngrpo_lora import rewards
from ngrpo_lora.cli.app import app
from ngrpo_lora.config import RunConfig, dump_config, load_config
from ngrpo_lora.records.checkpoints import STATE_FILE
from ngrpo_lora.registry import names


def refuse(*words: str) -> str:
    """The message of a command that must end with status 2 and no traceback; returns stderr."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("ngrpo: ")
    return result.stderr


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch: pytest.MonkeyPatch):
    """A command that reaches for the trainer, a model or its libraries without need fails."""
    for name in ("ngrpo_lora.trainer", "ngrpo_lora.sampling", "diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("trainer", "sampling"):
        monkeypatch.delattr(ngrpo_lora, name, raising=False)


@pytest.fixture
def trained(nothing_heavy: None, monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Configurations that reached the trainer, which is replaced."""
    seen: list[RunConfig] = []
    fake = type(sys)("ngrpo_lora.trainer")
    fake.train = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ngrpo_lora.trainer", fake)
    monkeypatch.setattr(ngrpo_lora, "trainer", fake, raising=False)
    return seen


def test_help_names_the_commands_and_loads_no_model_library(tmp_path: Path):
    code = (
        "import sys; from ngrpo_lora.cli import app\n"
        "try: app(['--help'], prog_name='ngrpo')\n"
        "finally: assert not {'diffusers', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for command in ("train", "sample", "score", "compare", "curves", "config"):
        assert command in result.stdout


def test_a_process_ends_with_status_2_and_one_line(tmp_path: Path):
    code = "from ngrpo_lora.cli import app; app(prog_name='ngrpo')"
    command = [sys.executable, "-c", code, "train", "rollout.group_size=1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("ngrpo: rollout.group_size must be at least 2, got 1")
    assert len(result.stderr.splitlines()) == 1


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("ngrpo-lora 0.")


def test_config_prints_yaml_that_loads_as_itself(tmp_path: Path):
    result = CliRunner().invoke(app, ["config", "rollout.num_steps=6"])
    assert result.exit_code == 0
    path = tmp_path / "config.yaml"
    path.write_text(result.output)
    assert load_config(path) == load_config(None, ["rollout.num_steps=6"])
    assert yaml.safe_load(result.output)["rollout"]["num_steps"] == 6


def test_config_takes_a_preset_or_a_file_first(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 7\n")
    for first, seed in (("flux", 0), (str(path), 7)):
        result = CliRunner().invoke(app, ["config", first, "rollout.num_steps=9"])
        assert yaml.safe_load(result.output)["seed"] == seed
        assert yaml.safe_load(result.output)["rollout"]["num_steps"] == 9


def test_describe_lists_every_key():
    result = CliRunner().invoke(app, ["config", "--describe"])
    assert result.exit_code == 0
    for key in ("rollout.group_size", "algorithm.perturbation_strength", "evaluation.strict", "resume"):
        assert f"\n{key} " in result.output


def test_train_hands_the_checked_config_to_the_trainer(trained: list[RunConfig], tmp_path: Path):
    result = CliRunner().invoke(
        app, ["train", "--num-processes", "1", f"output_dir={tmp_path / 'new' / 'run'}", "seed=5"]
    )
    assert result.exit_code == 0, result.output
    assert [config.seed for config in trained] == [5]
    assert (tmp_path / "new" / "run").is_dir()


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
        (["prompts.train=empty"], "prompts.train must be a readable text file"),
        (["rewards=my_reward.py:score"], "rewards.train.0.name names the file 'my_reward.py', which does not exist"),
        (["evaluation.rewards=a.b:c"], "evaluation.rewards.0.name names the module 'a.b'"),
        (["output_dir=blank.txt"], "output_dir must be a writable folder"),
        (["output_dir=blank.txt/run"], "output_dir must be a writable folder"),
        (["output_dir=held"], "resume=latest"),
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
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.yaml").write_text(dump_config(load_config()))
    text = refuse("train", *words)
    assert part in text
    assert len(text.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_train_refuses_a_folder_without_write_permission(tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "output_dir must be a writable folder" in refuse("train", f"output_dir={tmp_path / 'locked'}")


RESUMES = ["latest", "run/checkpoints/iteration-000010", "run/checkpoints/iteration-000010/state.pt"]


def make_run(folder: Path) -> None:
    (folder / "checkpoints" / "iteration-000010").mkdir(parents=True)
    (folder / "checkpoints" / "iteration-000010" / STATE_FILE).touch()
    (folder / "config.yaml").write_text(dump_config(load_config(None, [f"output_dir={folder}"])))


@pytest.mark.parametrize("resume", RESUMES)
def test_resume_refuses_other_settings_and_names_them(resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    text = refuse("train", f"output_dir={tmp_path / 'run'}", f"resume={resume}", "lora.rank=8", "seed=1")
    assert "lora.rank: 16 -> 8" in text
    assert "seed: 0 -> 1" in text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize("resume", RESUMES)
def test_resume_may_change_length_and_evaluation(
    resume: str, trained: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    words = [f"resume={resume}", "trainer.num_iterations=900", "trainer.save_every=7", "evaluation.every=3"]
    result = CliRunner().invoke(app, ["train", "--num-processes", "1", f"output_dir={tmp_path / 'run'}", *words])
    assert result.exit_code == 0, result.output
    assert trained[0].run.num_iterations == 900


def test_a_missing_8bit_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    result = CliRunner().invoke(
        app, ["train", "--num-processes", "1", "optimizer.name=lion_8bit", f"output_dir={tmp_path / 'run'}"]
    )
    assert result.exit_code == 2
    assert "ngrpo-lora[8bit]" in result.output


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = type(sys)("ngrpo_lora.trainer")
    fake.train = lambda config: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ngrpo_lora.trainer", fake)
    monkeypatch.setattr(ngrpo_lora, "trainer", fake, raising=False)
    result = CliRunner().invoke(app, ["train", "--num-processes", "1", f"output_dir={tmp_path / 'run'}"])
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--prompt", "a star", "--adapter", "gone.safetensors"], "'gone.safetensors' does not exist"),
        (["--prompt", "a star", "--adapter", "."], "holds no pytorch_lora_weights.safetensors"),
        (["--prompt", "  "], "--prompt must not be empty"),
        ([], "--prompt, --prompts or --like must be given"),
        (["--prompt", "a star", "--adapter", "x:nan"], "the strength of an adapter must be finite, got nan for 'x'"),
        (["--prompt", "a star", "--output", "file.txt"], "--output must be a writable folder"),
    ],
)
def test_sample_refuses_bad_input(words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    assert part in refuse("sample", *words)


# curves -------------------------------------------------------------------------------------------------------------


def test_curves_prints_a_table_and_draws_the_curves(tmp_path: Path):
    for name, after in (("one", 0.75), ("two", 0.5)):
        rows = [
            {"step": 0, "eval/reward_mean": 0.25, "eval/strict_accuracy": 0.1, "time/evaluation_s": 30.0},
            {"step": 1, "time/rollout_s": 60.0, "time/update_s": 30.0},
            {"step": 2, "eval/reward_mean": after, "eval/strict_accuracy": after / 2, "time/evaluation_s": None},
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = tmp_path / "new" / "curves.png"
    result = CliRunner().invoke(app, ["curves", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(curves)])
    assert result.exit_code == 0, result.output
    assert "| one | 2 | 2.0 | 0.250 → 0.750 | 10.0% → 37.5% |" in result.stdout
    assert "| two | 2 | 2.0 | 0.250 → 0.500 | 10.0% → 25.0% |" in result.stdout
    assert Image.open(curves).size[0] > 500


def test_curves_needs_runs(tmp_path: Path):
    assert "holds no metrics.jsonl" in refuse("curves", str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/rew')  # killed in the first evaluation's line
    assert "has no metrics yet" in refuse("curves", str(tmp_path))


# Rewards ------------------------------------------------------------------------------------------------------------


def test_rewards_are_listed_with_what_they_say():
    lines = CliRunner().invoke(app, ["rewards"]).stdout.splitlines()
    listed = {line.split()[0]: line for line in lines if line and line[0] != "`"}
    assert set(listed) == set(names(rewards))
    assert "prefer an image" in listed["hpsv2"]


def test_a_reward_is_described_with_its_settings():
    text = CliRunner().invoke(app, ["rewards", "judge"]).stdout
    assert "P(yes) / (P(yes) + P(no))" in text
    assert re.search(r"^base_url +text +http://localhost:8000/v1 ", text, re.MULTILINE)
    assert re.search(r"^name +text +required ", text, re.MULTILINE)


def test_an_unknown_reward_names_the_nearest():
    assert "did you mean pickscore?" in refuse("rewards", "pikscore")


def test_the_demo_runs_as_two_processes_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from ngrpo_lora.cli import launching
    from ngrpo_lora.training import processes

    started: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(launching, "launch", lambda count, words: started.append((count, words)) or 0)
    result = CliRunner().invoke(app, ["train", "demo", "model.device=cpu", f"output_dir={tmp_path / 'run'}"])
    assert result.exit_code == 0, result.output
    ((count, words),) = started
    assert count == 2
    assert words[1:] == ["-m", "ngrpo_lora", "train", "demo", "model.device=cpu", f"output_dir={tmp_path / 'run'}"]
