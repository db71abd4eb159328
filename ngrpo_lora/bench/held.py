"""An algorithm whose iterations all train the same number of transitions, so that their times can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ngrpo_lora.algorithms._base import Algorithm, losses
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import VelocityFn
from ngrpo_lora.types import RewardBatch, Rollout, Transition, Velocities

__all__ = ["HeldAlgorithm"]


class HeldAlgorithm:
    """An algorithm that trains so many transitions an iteration, whatever the pictures are worth."""

    def __init__(self, algorithm: Algorithm, transitions: int | None = None):
        """Put it around an algorithm; None trains all transitions."""
        self.algorithm, self.transitions = algorithm, transitions
        self.needs_reference, self.needs_old = algorithm.needs_reference, algorithm.needs_old
        self.metric_names = algorithm.metric_names

    def rollout(
        self,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        latent_shape: tuple[int, ...],
        seeds: Sequence[int],
        iteration: int,
        device: torch.device | str = "cpu",
    ) -> list[Rollout]:
        """Draw a rollout as the measured algorithm does."""
        return self.algorithm.rollout(velocity_fn, schedule, latent_shape, seeds, iteration, device)

    def advantages(self, batch: RewardBatch) -> Tensor:
        """Advantages of rewards that halve from candidate to candidate, so that no group and no sample is without."""
        # Evenly spaced ones would leave the middle one of an odd group with none; a power of two is never their mean.
        made_up = (0.5 ** torch.arange(batch.rewards.shape[1], dtype=batch.rewards.dtype)).expand_as(batch.rewards)
        return self.algorithm.advantages(replace(batch, rewards=made_up, valid=torch.ones_like(batch.valid)))

    def updates(self, advantages: Tensor, seed: int, iteration: int) -> list[list[Transition]]:
        """The first transitions of every update: they take turns until the number is reached."""
        updates = self.algorithm.updates(advantages, seed, iteration)
        turns = sorted((turn, place) for place, update in enumerate(updates) for turn in range(len(update)))
        counts = Counter(place for _, place in turns[: self.transitions])
        return [update[: counts[place]] for place, update in enumerate(updates)]

    def loss(
        self, rollout: Rollout, advantages: Tensor, transition: Transition, velocities: Velocities
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of the measured algorithm on a rollout's transitions."""
        return self.algorithm.loss(rollout, advantages, transition, velocities)

    def losses(
        self,
        rollouts: Sequence[Rollout],
        advantages: Tensor,
        transitions: Sequence[Transition],
        velocities: Velocities,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The losses of the measured algorithm on a micro-batch, at once where it can."""
        return losses(self.algorithm, rollouts, advantages, transitions, velocities)
