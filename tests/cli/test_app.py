"""The command as a whole: exit status, messages, and what it does not load."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.cli.app import as_meant, split_arguments
from ngrpo_lora.config import RunConfig
from ngrpo_lora.errors import ConfigError

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


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("option", ["bench solver --shift", "bench vote --wrong", "plan --tflops", "plan --gpu-memory"])
def test_what_is_no_number_is_in_no_range(option: str, number: str):
    result = CliRunner().invoke(app, [*option.split(), "1", option.split()[-1], number])
    assert result.exit_code == 2
    assert re.fullmatch(rf"ngrpo: {option.split()[-1]} must be .*, got {number}\n", result.output)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("sample -p x --num-images 0", "--num-images must be at least 1, got 0"),
        ("sample -p x --steps 1.5", "--steps must be a whole number, got '1.5'"),
        ("sample -p x --strength much", "--strength must be a number, got 'much'"),
        ("reward-server jpeg --port 70000", "--port must be at most 65535, got 70000"),
        ("bench solver --steps 4 --steps 0", "--steps must be at least 1, got 0"),  # of a command's command
    ],
)
def test_an_impossible_value_of_an_option_is_one_line(words: str, problem: str):
    result = CliRunner().invoke(app, words.split())
    assert (result.exit_code, result.output) == (2, f"ngrpo: {problem}\n")


def test_what_is_missing_or_unknown_is_shown_with_the_usage():
    for words, part in (("merge a", "Missing option '--output'"), ("score --batch-size 0", "No such option")):
        result = CliRunner().invoke(app, words.split())
        assert result.exit_code == 2
        assert "Usage: " in result.output
        assert part in result.output


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


def test_the_config_is_the_first_word_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").touch()
    assert split_arguments(None) == (None, [])
    assert split_arguments(["demo", "seed=1"]) == ("demo", ["seed=1"])
    assert split_arguments(["seed=1", "lora.rank=2"]) == (None, ["seed=1", "lora.rank=2"])
    assert split_arguments(["a=b", "seed=1"]) == ("a=b", ["seed=1"])
    assert split_arguments(["runs/lr=1e-4/config.yaml"]) == ("runs/lr=1e-4/config.yaml", [])
    for setting in ("output_dir=runs/a.yaml", "prompts.train.world:train/color=3", "output_dir=" + "x" * 5000):
        assert split_arguments([setting]) == (None, [setting])


def test_a_word_begins_at_home_or_with_a_variable_as_in_a_shell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    monkeypatch.delenv("GONE", raising=False)
    for word in ("~/a.png", "$HOME/a.png", "${HOME}/a.png"):
        assert as_meant(word) == "/home/me/a.png"
        assert as_meant(f"--output={word}") == "--output=/home/me/a.png"
    for word in ("output_dir=~/r", "costs $HOME", "$5", "a~", "~ about 5", "--prompt=$5 bill"):
        assert as_meant(word) == word
    with pytest.raises(ConfigError, match="set GONE"):
        as_meant("$GONE/a.png")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["sample", "--prompt", "caf\udce9"], "ngrpo: words must be UTF-8 text, got 'caf\\udce9'"),
        (["curves", "$NO_SUCH_VARIABLE/run"], "ngrpo: a path must not name a variable that is not set"),
        (["curves", "x" * 300], "ngrpo: a path must have names that a file can have, got 'xxx"),
    ],
)
def test_a_word_that_cannot_be_meant_is_refused_in_one_line(words: list[str], problem: str):
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith(problem)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_of_another_encoding_shows_escapes(encoding: str, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("ein Käse → 😀\n", encoding="utf-8")
    command = [sys.executable, "-m", "ngrpo_lora", "prompts", "inspect", "mine.txt"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    kaese = {"cp1252": "Käse", "ascii": r"K\xe4se"}[encoding]
    assert rf"ein {kaese} \u2192 \U0001f600" in result.stdout.decode(encoding)


def test_a_command_that_loads_a_model_says_its_own_words_alone(tmp_path: Path):
    command = [sys.executable, "-m", "ngrpo_lora", "sample", "--model", "embedded", "--prompt", "a red star"]
    result = subprocess.run(
        [*command, "--steps", "2", "--output", "drawn"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{Path('drawn/000-a-red-star-seed0.png')}\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_memory_that_passes_free_is_kept(tmp_path: Path):
    code = """if True:
        import resource, sys
        from ngrpo_lora.cli import app
        if sys.argv[1:]:
            app(["config"], standalone_mode=False)

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [bytearray(2**20) for _ in range(200)]
            blocks.clear()
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        print(max([faults() for _ in range(4)][1:]), file=sys.stderr)
    """
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", code, *word], cwd=tmp_path, capture_output=True, text=True).stderr)
        for word in ([], ["app"])
    )
    assert kept < given_back / 4  # pages may be of 4 KB or of 2 MB
