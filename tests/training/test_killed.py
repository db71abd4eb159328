"""A run that is killed at any moment goes on with the same command, and ends bit for bit as one that was not."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs import assert_same_run, ended, moments, seconds, start_training, wait_for

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


def go_on_and_compare(words: Sequence[object], run: Path, alone: Path) -> None:
    """Start the same command again: a run that had ended before it was killed has nothing left to do."""
    assert ended(start_training(words)) == 0
    assert not [path for path in run.rglob(".*.partial")]
    assert_same_run(run, alone)


@pytest.mark.parametrize("moment", moments("any", 0, 30))
def test_a_run_killed_at_any_moment_goes_on(moment: str, short_run: Path, alone: Path, tmp_path: Path):
    words = [short_run, f"output_dir={tmp_path}", "resume=auto"]
    process = start_training(words)
    time.sleep(random.Random(moment).uniform(0, seconds(alone)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    go_on_and_compare(words, tmp_path, alone)


@pytest.mark.parametrize("moment", moments("before the first checkpoint", 0, 10))
def test_a_run_killed_before_its_first_checkpoint_goes_on(moment: str, short_run: Path, alone: Path, tmp_path: Path):
    words = [short_run, f"output_dir={tmp_path}"]
    process = start_training(words)
    wait_for(lambda: (tmp_path / "config.yaml").exists() or process.poll() is not None)
    time.sleep(random.Random(moment).uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if any((tmp_path / "checkpoints").glob("iteration-*")):
        words.append("resume=latest")  # on a fast machine
    go_on_and_compare(words, tmp_path, alone)


@pytest.mark.parametrize("moment", moments("inside a save", 1, 10))
def test_a_run_killed_inside_a_save_goes_on(moment: str, short_run: Path, alone: Path, tmp_path: Path):
    words = [short_run, f"output_dir={tmp_path}", "resume=auto"]
    process = start_training(words, "-c", KILLED_IN_A_SAVE, str(random.Random(moment).randint(1, 40)))
    assert ended(process) == -signal.SIGKILL
    go_on_and_compare(words, tmp_path, alone)
