"""A run that is killed at any moment goes on with the same command, and ends bit for bit as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import MakeConfig
from runs import assert_same_run

from ngrpo_lora.config import dump_config

RUN = ("trainer.num_iterations=6", "trainer.save_every=2", "evaluation.every=3", "evaluation.num_prompts=2")

# The command, which is killed when it has made sure for the nth time that something is on the disk.
KILLED_IN_A_SAVE = """
import os, signal, sys
from ngrpo_lora.records import files

left, flush = int(sys.argv.pop(1)), files.flush

def killing(path):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)

files.flush = killing
from ngrpo_lora.cli import app
app()
"""


@pytest.fixture(scope="module")
def file(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "run.yaml").write_text(dump_config(make_config(folder / "run", *RUN)))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def alone(file: Path) -> Path:
    """The run that nobody killed, and how long it took."""
    started = time.monotonic()
    assert start([file, f"output_dir={file.parent / 'alone'}"]).wait(300) == 0
    (file.parent / "seconds.txt").write_text(str(time.monotonic() - started))
    return file.parent / "alone"


def start(words: Sequence[object], *python: str) -> subprocess.Popen[bytes]:
    """`ngrpo train` of these words, as a process."""
    command = [sys.executable, *(python or ("-m", "ngrpo_lora")), "train", *map(str, words), "--num-processes", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def go_on_and_compare(words: Sequence[object], run: Path, alone: Path) -> None:
    """Start the same command again: a run that had ended before it was killed has nothing left to do."""
    assert start(words).wait(300) == 0
    assert not [path for path in run.rglob(".*.partial")]
    assert_same_run(run, alone)


def moments(kind: str, default: int, every: int) -> list[object]:
    """Seeds of random moments of a kind, the first `default` of them for the default suite."""
    marks = [() if seed < default else (pytest.mark.slow,) for seed in range(every)]
    return [pytest.param(f"{kind} {seed}", marks=mark) for seed, mark in enumerate(marks)]


@pytest.mark.parametrize("moment", moments("any", 0, 30))
def test_a_run_killed_at_any_moment_goes_on(moment: str, file: Path, alone: Path, tmp_path: Path):
    words = [file, f"output_dir={tmp_path}", "resume=auto"]
    process = start(words)
    time.sleep(random.Random(moment).uniform(0, float((file.parent / "seconds.txt").read_text())))
    process.send_signal(signal.SIGKILL)
    process.wait()
    go_on_and_compare(words, tmp_path, alone)


@pytest.mark.parametrize("moment", moments("before the first checkpoint", 0, 10))
def test_a_run_killed_before_its_first_checkpoint_goes_on(moment: str, file: Path, alone: Path, tmp_path: Path):
    words = [file, f"output_dir={tmp_path}"]
    process = start(words)
    wait_for(lambda: (tmp_path / "config.yaml").exists() or process.poll() is not None)
    time.sleep(random.Random(moment).uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if any((tmp_path / "checkpoints").glob("iteration-*")):
        words.append("resume=latest")  # on a fast machine
    go_on_and_compare(words, tmp_path, alone)


@pytest.mark.parametrize("moment", moments("inside a save", 1, 10))
def test_a_run_killed_inside_a_save_goes_on(moment: str, file: Path, alone: Path, tmp_path: Path):
    words = [file, f"output_dir={tmp_path}", "resume=auto"]
    process = start(words, "-c", KILLED_IN_A_SAVE, str(random.Random(moment).randint(1, 40)))
    assert process.wait(300) == -signal.SIGKILL
    go_on_and_compare(words, tmp_path, alone)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)
