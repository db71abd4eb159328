"""What methods of the forward process share: clean samples of any solver, noised anew where they are trained.

    latents = (1 - sigma) * clean + sigma * fresh

Nothing is asked of how a sample was drawn: no log-probability, no trajectory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.config.algorithms._forward import ForwardConfig
from ngrpo_lora.equations.noise import group_noises
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import SOLVERS, VelocityFn
from ngrpo_lora.types import Rollout, Velocities

Settings = TypeVar("Settings", bound=ForwardConfig)


class ForwardAlgorithm(ABC, Generic[Settings]):
    """See `_base.Algorithm` for the contract; a method fills in `levels`, and how samples are weighed."""

    def __init__(self, config: Settings, rollout: RolloutConfig):
        self.config = config
        self.needs_reference = config.reference_weight > 0
        self.group_size, self.num_steps = rollout.group_size, rollout.num_steps
        self.solve = SOLVERS[rollout.solver]

    @abstractmethod
    def levels(self, schedule: Schedule, seed: int) -> Tensor:
        """The noise levels at which a group is trained, (W,) float32 in (0, 1]."""

    def rollout(
        self,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        latent_shape: tuple[int, ...],
        seeds: Sequence[int],
        iteration: int,
        device: torch.device | str = "cpu",
    ) -> list[Rollout]:
        """Independent noises, solved to the end, and noised again: latents (W, G, C, H, W), sigmas (W,)."""
        noises = group_noises(latent_shape, seeds, self.group_size, "start").to(device)  # (P, G, C, H, W)
        final = self.solve(velocity_fn, noises, schedule.sigmas)[-1]
        rollouts = []
        for clean, seed in zip(final, seeds, strict=True):
            sigmas = self.levels(schedule, seed)
            fresh = [group_noises(latent_shape, [seed], self.group_size, "forward", i)[0] for i in range(len(sigmas))]
            amounts = sigmas.to(device).view(-1, *[1] * clean.ndim)  # (W, 1, 1, 1, 1)
            latents = (1 - amounts) * clean + amounts * torch.stack(fresh).to(device)
            rollouts.append(Rollout(latents, sigmas, clean))
        return rollouts

    def pulled(self, loss: Tensor, velocities: Velocities) -> Tensor:
        """The loss with the pull to the base: the mean squared distance of velocities, weighed."""
        if velocities.reference is None:
            return loss
        drift = (velocities.current - velocities.reference).double()
        return loss + self.config.reference_weight * drift.square().mean()


def clean_error(latents: Tensor, velocity: Tensor, sigma: float, clean: Tensor) -> Tensor:
    """How far the clean prediction `latents - sigma * velocity` is from the clean sample, all (C, H, W), in float64."""
    return latents.double() - sigma * velocity.double() - clean.double()
