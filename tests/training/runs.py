"""Runs of the trainer in tests: what they leave, what stops them, and what goes wrong with them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FinishedRun, MakeConfig
from safetensors.torch import load_file

from ngrpo_lora.config import RunConfig
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.records import checkpoints
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.training.watcher import Watcher

ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"

EVERY_STEP = {
    "step",
    "rollout/reward_mean",
    "rollout/reward_std",
    "rollout/zero_spread_share",
    "rollout/failed_share",
    "policy/clip_fraction",
    "policy/max_abs_log_ratio",
    "policy/entropy",
    "policy/skipped_updates",
    "nfe/old_per_sample",
    "nfe/theta_per_sample",
    "time/rollout_s",
    "time/reward_s",
    "time/update_s",
    "lora/grad_norm",
    "lora/learning_rate",
}

SEVERAL = ["rollout.prompts_per_iteration=4", "evaluation.num_prompts=5", "evaluation.num_samples=3"]

# Redness, and on one process of several something worse; what it does is asked for by a file beside it.
TROUBLE = """
import os, time
from pathlib import Path
import numpy as np

def score(images, prompts, metadata):
    trouble = Path(__file__).with_suffix(".txt")
    if trouble.exists() and os.environ.get("RANK") == "1":
        {}
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
"""

# What a reward's file does where the command was told by STOPPED_IN, such as "update 3 0.2": it has the command sent
# SIGTERM in its third update, which then takes 0.2 s longer, so that the signal arrives in it.
STOPPING = """
import os, signal, time
from ngrpo_lora.records import checkpoints
from ngrpo_lora.training import trainer

PLACES = {
    "rollout": (trainer, "decode"),
    "reward": (trainer, "collect"),
    "update": (trainer, "update"),
    "save": (checkpoints, "save"),
    "evaluation": (trainer, "evaluate"),
    "export": (trainer, "export"),
}

def stop_in(stage, number, delay_s):
    owner, name = PLACES[stage]
    original, left = getattr(owner, name), int(number)

    def stopping(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getppid() if "RANK" in os.environ else os.getpid(), signal.SIGTERM)
            time.sleep(float(delay_s))
        return original(*args, **kwargs)

    setattr(owner, name, stopping)

if os.environ.get("STOPPED_IN") and os.environ.get("RANK", "0") == "0":
    stop_in(*os.environ["STOPPED_IN"].split())
"""


def read_rows(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def assert_same_run(output_dir: Path, other: Path) -> None:
    """Bit for bit: metrics but for wall times, the adapter, and the last state."""
    assert without_times(read_rows(output_dir)) == without_times(read_rows(other))
    assert_same_state(load_file(output_dir / ADAPTER), load_file(other / ADAPTER))
    ours, theirs = (checkpoints.load("latest", folder, "cpu") for folder in (output_dir, other))
    assert_same_state(ours, theirs)


def adapter_weights(output_dir: Path) -> torch.Tensor:
    """All numbers of the exported adapter."""
    tensors = load_file(output_dir / ADAPTER)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_nearly_same_run(one: Path, other: Path) -> None:
    """Equal but for the order of additions; Adam's first steps divide by tiny gradients and magnify it."""
    for row, same in zip(read_rows(one), read_rows(other), strict=True):
        for key in row.keys() - {key for key in row if key.startswith("time/")}:
            assert same[key] == pytest.approx(row[key], rel=1e-3, abs=1e-5), key
    difference = (adapter_weights(one) - adapter_weights(other)).norm() / adapter_weights(one).norm()
    assert difference < 1e-3
    for folder, suffix in (("samples", "png"), ("evaluations", "jsonl")):
        names = [path.name for path in sorted((one / folder).glob(f"*.{suffix}"))]
        assert names == [path.name for path in sorted((other / folder).glob(f"*.{suffix}"))]
        assert names


def assert_same_state(ours: Any, theirs: Any) -> None:
    """Nested dictionaries and lists of equal tensors and values."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same_state(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_state(mine, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.lora_step.parameters.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def resume_and_compare(finished_run: FinishedRun, make_config: MakeConfig, output_dir: Path) -> None:
    config = make_config(output_dir, *finished_run.overrides, "resume=latest")
    check_run(config)
    complete(prepare(config))
    assert_same_run(output_dir, finished_run.output_dir)


# One update ---------------------------------------------------------------------------------------------------------

ONE_UPDATE = ["trainer.num_iterations=1", "algorithm.updates_per_rollout=1", "evaluation.num_prompts=1"]


def one_update(config: Any) -> tuple[dict[str, torch.Tensor], dict[str, float], Run]:
    """Gradients before the only optimizer step of a run of one iteration, and its metrics.

    Adam divides gradients by their size, so weights after a step would magnify rounding.
    """
    run, gradients = prepare(config), {}
    step = run.lora_step.optimizer.step

    def spy(*args: Any) -> Any:
        gradients.update({name: p.grad.clone() for name, p in run.lora_step.parameters.items() if p.grad is not None})
        return step(*args)

    run.lora_step.optimizer.step = spy  # pyright: ignore
    complete(run)
    return gradients, read_rows(Path(config.output_dir))[1], run


# What stops them ----------------------------------------------------------------------------------------------------


class Stop(Exception):
    """What a test's watcher raises."""


class Stopper(Watcher):
    """Writes down what it is told, and stops the run before the first pass at which `when` is true."""

    def __init__(self, when: Callable[[Run, Stopper], bool] = lambda run, watcher: False):
        self.when, self.run, self.passes, self.updates = when, None, 0, 0
        self.groups: list[tuple[str, int, list[float]]] = []
        self.steps: list[tuple[int, dict[str, float]]] = []

    def watch(self, config: RunConfig) -> Run:
        self.run = prepare(config, self)
        self.run.lora_step.optimizer.register_step_post_hook(lambda *_: setattr(self, "updates", self.updates + 1))
        return self.run

    def before_pass(self) -> None:
        self.passes += 1
        if self.run is not None and self.when(self.run, self):
            raise Stop

    def after_rewards(self, prompt: str, images: Any, rewards: Any) -> None:
        self.groups.append((prompt, len(images), rewards))

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append((step, metrics))


# What goes wrong with them ------------------------------------------------------------------------------------------


def poison(run: Run, chosen: Callable[[int], bool]) -> None:
    """Losses of the chosen transitions, by their number in the run, become NaN."""
    losses, count = run.algorithm.losses, iter(range(10**6))  # pyright: ignore

    def poisoned(rollouts: Any, advantages: Any, transitions: Sequence[Any], velocities: Any) -> Any:
        values, metrics = losses(rollouts, advantages, transitions, velocities)
        factors = [math.nan if chosen(next(count)) else 1.0 for _ in transitions]
        return values * torch.tensor(factors), metrics

    run.algorithm.losses = poisoned  # pyright: ignore


def reward_of(folder: Path, body: str) -> str:
    (folder / "reward.py").write_text(f"def score(images, prompts, metadata):\n    return {body}\n")
    return f"rewards={folder / 'reward.py'}:score"


# As processes that are ended from outside ---------------------------------------------------------------------------


def start_training(
    words: Sequence[object], *python: str, processes: int = 1, asked: str = ""
) -> subprocess.Popen[bytes]:
    """`ngrpo train` of these words, as a process; `asked` is what STOPPING reads."""
    command = [sys.executable, *(python or ("-m", "ngrpo_lora")), "train", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOPPED_IN": asked}
    command += ["--num-processes", str(processes)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a command, which is given much time: of a core that others use, it may have a small share."""
    try:
        return process.wait(1200)
    finally:
        process.kill()


def seconds(run: Path) -> float:
    """How long the run took that nobody ended."""
    return float((run / "seconds.txt").read_text())


def moments(kind: str, default: int, every: int) -> list[object]:
    """Seeds of random moments of a kind, the first `default` of them for the default suite."""
    marks = [() if seed < default else (pytest.mark.slow,) for seed in range(every)]
    return [pytest.param(f"{kind} {seed}", marks=mark) for seed, mark in enumerate(marks)]


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 1200
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)
