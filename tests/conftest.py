"""What several test files share: two threads, and runs of the embedded model small enough for a test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ngrpo_lora.config import RunConfig, load_config

MakeConfig = Callable[..., RunConfig]

SMALL_RUN = [
    "rollout.num_steps=3",
    "rollout.group_size=4",
    "rollout.prompts_per_iteration=2",
    "algorithm.num_anchors=2",
    "algorithm.num_train_steps=2",
    "algorithm.updates_per_rollout=2",
    "lora.rank=4",
    "optimizer.learning_rate=1e-2",
    "trainer.num_iterations=2",
    "evaluation.num_prompts=2",
    "evaluation.every=2",
]

# Any picture has a score, two pictures rarely the same one, and no verifier is needed.
REDNESS = """
import numpy as np

def score(images, prompts, metadata):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
"""


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """Two cores, as in CI, unless the environment says otherwise; results must not depend on it."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(2)


@pytest.fixture(scope="session")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """`make_config(output_dir, "key=value", ...)`: SMALL_RUN on the embedded model, rewarded for redness."""
    reward = tmp_path_factory.mktemp("rewards") / "redness.py"
    reward.write_text(REDNESS)

    def make(output_dir: Path, *overrides: str) -> RunConfig:
        settings = dict(text.split("=", 1) for text in SMALL_RUN)
        settings |= {"rewards": f"{reward}:score", "output_dir": str(output_dir)}
        settings |= dict(text.split("=", 1) for text in overrides)
        return load_config(None, [f"{key}={value}" for key, value in settings.items()])

    return make
