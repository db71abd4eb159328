"""A run that SIGTERM ends at any moment loses the iteration under way at most, and goes on with the same command."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from runs import assert_nearly_same_run, assert_same_run, ended, moments, read_rows, seconds, start_training

from ngrpo_lora.records.checkpoints import checkpoints, number

# How many of the twenty moments are in each stage, and in which of its calls at most: a run whose last iteration is
# complete when it is asked to stop is finished.
STAGES = {"rollout": (4, 5), "reward": (3, 5), "update": (3, 5), "save": (3, 2), "evaluation": (2, 2), "export": (1, 1)}
MOMENTS = [
    *moments("start-up", 0, 4),
    *(moment for stage, (count, _) in STAGES.items() for moment in moments(stage, int(stage == "update"), count)),
]

# The command, which is sent a signal while its model loads.
ENDED_WHILE_LOADING = """
import os, signal, sys, time
from ngrpo_lora.models._base import BaseFamily

asked = int(sys.argv.pop(1))

def load(self, parts):
    os.kill(os.getpid(), asked)
    time.sleep(60)

BaseFamily.load = load
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may be run in the background, where shells ignore it
from ngrpo_lora.cli import app
app()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_is_ended_while_its_model_loads_leaves_nothing(
    signum: int, existed: bool, short_run: Path, tmp_path: Path
):
    folder = tmp_path / "runs" / "one"
    if existed:
        folder.mkdir(parents=True)
    words = [short_run, f"output_dir={folder}"]
    assert ended(start_training(words, "-c", ENDED_WHILE_LOADING, str(int(signum)))) in (130, 128 + signum)
    assert [*tmp_path.rglob("*")] == ([folder.parent, folder] if existed else [])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_ended_by_sigterm_goes_on(moment: str, processes: int, short_run: Path, alone: Path, tmp_path: Path):
    words = [short_run, f"output_dir={tmp_path}", "resume=auto"]
    stage, chance = moment.split()[0], random.Random(f"{moment} of {processes}")
    asked = f"{stage} {chance.randint(1, STAGES[stage][1])} {chance.uniform(0, 0.5)}" if stage in STAGES else ""
    process = start_training(words, processes=processes, asked=asked)
    if not asked:
        time.sleep(chance.uniform(0, seconds(alone) / 2))
        process.send_signal(signal.SIGTERM)
    assert ended(process) != 0
    if (tmp_path / "metrics.jsonl").is_file() and (rows := read_rows(tmp_path)):
        saved = max(map(number, checkpoints(tmp_path)), default=0)
        assert saved >= rows[-1]["step"]
    assert ended(start_training(words, processes=processes)) == 0
    (assert_same_run if processes == 1 else assert_nearly_same_run)(tmp_path, alone)
