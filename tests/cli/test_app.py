"""The command as a whole: exit status, messages, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.config import RunConfig

pytestmark = pytest.mark.usefixtures("nothing_heavy")


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


def test_an_error_of_ours_keeps_its_traceback(
    trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(sys.modules["ngrpo_lora.training.trainer"], "train", lambda *_: 1 / 0)
    result = CliRunner().invoke(app, ["train", "--num-processes", "1", f"output_dir={tmp_path / 'run'}"])
    assert isinstance(result.exception, ZeroDivisionError)
