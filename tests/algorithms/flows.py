"""Flows made of a formula, and runs of the embedded model with any algorithm, for the tests of algorithms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from conftest import MakeConfig
from torch import Tensor

from ngrpo_lora import registry
from ngrpo_lora.config import RolloutConfig, RunConfig, load_config
from ngrpo_lora.config.plugins import algorithm_settings
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import flow_sigmas
from ngrpo_lora.types import Metrics

SHAPE = (4, 6, 6)


def schedule_of(num_steps: int, shift: float = 3.0) -> Schedule:
    return Schedule(flow_sigmas(num_steps, shift), shift)


def velocity_fn(latents: Tensor, sigma: float) -> Tensor:
    return torch.sin(2 * latents) + sigma * latents


class Counted:
    """`velocity_fn` that notes sigma and number of samples of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, int]] = []

    def __call__(self, latents: Tensor, sigma: float) -> Tensor:
        self.calls.append((sigma, latents.shape[0] * latents.shape[1]))
        return velocity_fn(latents, sigma)

    @property
    def evaluations(self) -> int:
        return sum(samples for _, samples in self.calls)


MEAN, DEVIATION = 2.0, 0.5


def gaussian_velocity(latents: Tensor, sigma: float) -> Tensor:
    """The exact velocity of clean data N(2, 0.5^2)."""
    variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    return (sigma - (1 - sigma) * DEVIATION**2) / variance * (latents - (1 - sigma) * MEAN) - MEAN


def gaussian_start(sigma: float, shape: tuple[int, ...]) -> Tensor:
    """Latents of those data at sigma."""
    return (1 - sigma) * MEAN + math.sqrt((1 - sigma) ** 2 * DEVIATION**2 + sigma**2) * torch.randn(shape)


def run_config(make_config: MakeConfig, folder: Path, algorithm: str, *overrides: str) -> RunConfig:
    """A small run of the embedded model with an algorithm at its own defaults."""
    common = [
        f"algorithm={algorithm}",
        "rollout.shift=3.0",
        "evaluation.solver=dpmpp_2m",
        "evaluation.num_steps=6",
        "trainer.micro_batch_size=16",
        "optimizer.learning_rate=1e-30",
    ]
    small = make_config(folder).model_dump(mode="json")
    small.pop("algorithm")
    path = folder / "small.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(small))
    settings = dict(text.split("=", 1) for text in (*common, *overrides))
    return load_config(str(path), [f"{key}={value}" for key, value in settings.items()])


def last_metrics(folder: Path) -> Metrics:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()][-1]


def algorithm_of(name: str, rollout: RolloutConfig, **settings: Any) -> Any:
    """An algorithm by name, with a rollout's settings and its own; `eta=0` too, which no configuration may have."""
    config = algorithm_settings(name)(**{k: v for k, v in settings.items() if (k, v) != ("eta", 0.0)})
    config = config.model_copy(update=settings)
    return registry.load(registry.ALGORITHMS, name).Algorithm(config, rollout)
