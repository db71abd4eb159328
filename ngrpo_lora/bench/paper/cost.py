"""What an iteration costs in forward passes, known before any: the algorithm is run on a model that does nothing.

A forward pass with its backward pass counts as three forward passes (the backward pass has two matrix products for
each of the forward's). The runs count what they really spend; `outcomes.py` sets the two side by side.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import torch
from torch import Tensor

from ngrpo_lora.algorithms._opening import open_algorithm
from ngrpo_lora.config import RunConfig, parse_config
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import shifted
from ngrpo_lora.types import RewardBatch

__all__ = ["TRAINED", "Cost", "cost_of", "length", "total"]

TRAINED = 3
"""Forward passes that one with its backward pass counts as."""

PROBED = 8


@dataclass(frozen=True)
class Cost:
    """Function evaluations per sample of one iteration, without gradients (NFE_old) and with them (NFE_theta)."""

    old: float
    theta: float

    @property
    def total(self) -> float:
        """Forward passes per sample, a trained one as three."""
        return total(self.old, self.theta)


def total(old: float, theta: float) -> float:
    """Forward passes per sample: NFE_old + 3 NFE_theta."""
    return old + TRAINED * theta


@torch.no_grad()
def cost_of(config: RunConfig, iteration: int = 0) -> Cost:
    """Function evaluations of one iteration in which every group has different rewards.

    The old velocities of later updates and the base's are counted as `training/updates.py` computes them.
    """
    rollout, algorithm = config.rollout, open_algorithm(config)
    groups, samples = rollout.prompts_per_iteration, rollout.prompts_per_iteration * rollout.group_size
    sigmas = shifted(torch.linspace(1, 0, rollout.num_steps + 1, dtype=torch.float64), rollout.shift or 1.0).float()
    forwards = 0

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        nonlocal forwards
        forwards += latents.shape[0] * latents.shape[1]
        return torch.zeros_like(latents)

    algorithm.rollout(velocity, Schedule(sigmas, rollout.shift or 1.0), (1, 2, 2), [*range(groups)], iteration)
    rewards = torch.rand(groups, rollout.group_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = RewardBatch(rewards, torch.ones_like(rewards, dtype=torch.bool), {"reward": rewards})
    first, *later = algorithm.updates(algorithm.advantages(batch), 0, iteration)
    trained = len(first) + sum(map(len, later))
    old = algorithm.needs_old * sum(map(len, later)) + algorithm.needs_reference * trained
    return Cost((forwards + old) / samples, trained / samples)


def length(config: RunConfig, budget: float) -> tuple[int, float]:
    """How many iterations, at least one, cost at most `budget` forward passes per sample; and the mean cost of one.

    The mean is over `PROBED` iterations of the run, evenly spaced: a window of stochastic steps that moves may make
    some dearer than others.
    """
    dumped = json.dumps(config.model_dump(mode="json", include={"algorithm", "rollout"}))
    horizon = max(1, math.floor(budget / _total(dumped, 0)))
    mean = fmean(_total(dumped, iteration) for iteration in sorted({horizon * i // PROBED for i in range(PROBED)}))
    return max(1, math.floor(budget / mean + 1e-9)), mean


@cache
def _total(dumped: str, iteration: int) -> float:
    return cost_of(parse_config(json.loads(dumped)), iteration).total
