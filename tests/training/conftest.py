"""One update of the trainer, which others must equal, and one short run, which those that were ended must equal."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import REDNESS, MakeConfig
from runs import ONE_UPDATE, STOPPING, ended, one_update, start_training

from ngrpo_lora.config import dump_config


@pytest.fixture(scope="session")
def plain_update(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory):
    return one_update(make_config(tmp_path_factory.mktemp("plain"), *ONE_UPDATE, "trainer.micro_batch_size=8"))


@pytest.fixture(scope="session")
def short_run(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of six iterations, which saves three times and evaluates three times."""
    folder = tmp_path_factory.mktemp("short")
    (folder / "reward.py").write_text(REDNESS + STOPPING)
    length = ("trainer.num_iterations=6", "trainer.save_every=2", "evaluation.every=3", "evaluation.num_prompts=2")
    config = make_config(folder / "run", *length, f"rewards={folder / 'reward.py'}:score")
    (folder / "run.yaml").write_text(dump_config(config))
    return folder / "run.yaml"


@pytest.fixture(scope="session")
def alone(short_run: Path) -> Path:
    """The run that nobody ended, and how long it took."""
    folder, started = short_run.parent / "alone", time.monotonic()
    assert ended(start_training([short_run, f"output_dir={folder}"])) == 0
    (folder / "seconds.txt").write_text(str(time.monotonic() - started))
    return folder
