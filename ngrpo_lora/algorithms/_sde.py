"""What the SDE baselines share: stochastic steps, their advantages, and the clipped objective of one step.

    x' = mean(x, v) + std * noise,   log pi = log N(x'; mean, std^2), averaged over dimensions

A method says which steps are stochastic, in what form, and how the rest is solved. Departures from all published codes:

- Log-ratios come from the difference of velocities, not of two log-probabilities (`equations/sde.py`). In the first
  update they are exactly 0; in later ones of unchanged weights 0 but for the rounding of the rollout's velocities, and
  exactly 0 with `reuse_velocities: false`.
- A sample without an advantage gives no transition: in the codes its transitions have a gradient of 0. A sample that
  failed is one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ngrpo_lora.algorithms._dealing import deal, with_advantage
from ngrpo_lora.algorithms._steps import before_last
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.config.algorithms._sde import SdeConfig
from ngrpo_lora.equations import sde
from ngrpo_lora.equations.advantages import group_advantages
from ngrpo_lora.equations.noise import group_noises
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import VelocityFn, euler
from ngrpo_lora.equations.surrogate import clipped_objective
from ngrpo_lora.types import RewardBatch, Rollout, Transition, Velocities, beside

Settings = TypeVar("Settings", bound=SdeConfig)


@dataclass(frozen=True)
class SdeRollout(Rollout):
    """A rollout with the velocities at the starts of its W stochastic steps, velocities: (W, G, C, H, W) float32.

    Its latents and its sigmas, both W + 1, are those of these steps alone.
    """

    velocities: Tensor


class SdeAlgorithm(ABC, Generic[Settings]):
    """See `_base.Algorithm` for the contract; a method fills in `window`, `step` and perhaps `rest`."""

    metric_names = ("policy/clip_fraction", "policy/max_abs_log_ratio")
    shares_noise = True
    """Whether the samples of a group start at the same noise."""

    def __init__(self, config: Settings, rollout: RolloutConfig, steps: range | None = None):
        self.config = config
        self.trainable = before_last(steps, rollout.num_steps)
        self.group_size, self.num_steps = rollout.group_size, rollout.num_steps
        self.needs_reference = config.reference_weight > 0
        self.needs_old = not config.reuse_velocities

    @abstractmethod
    def window(self, iteration: int) -> range:
        """The stochastic steps of an iteration, which may be trained."""

    @abstractmethod
    def step(self, latents: Tensor, velocity: Tensor, sigmas: Tensor, index: int) -> sde.SdeStep:
        """The Gaussian of latents (B, ...) after the step from `sigmas[index]`."""

    def steps_trained(self, window: int) -> int:
        """How many of the stochastic steps, `window` in all, are trained for each sample; they are drawn at random."""
        return window

    def rollout(
        self,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        latent_shape: tuple[int, ...],
        seeds: Sequence[int],
        iteration: int,
        device: torch.device | str = "cpu",
    ) -> list[Rollout]:
        """Euler steps to the window, stochastic ones within it, and the rest."""
        window = self.window(iteration)
        trajectory, velocities = [self.starts(latent_shape, seeds).to(device)], []
        if window.start > 0:
            trajectory = euler(velocity_fn, trajectory[0], schedule.sigmas[: window.start + 1])[-1:]
        for index in window:
            velocities.append(velocity_fn(trajectory[-1], schedule.sigmas[index].item()))
            step = self.step(trajectory[-1], velocities[-1], schedule.sigmas, index)
            fresh = self.noises(latent_shape, seeds, "step", index).to(device) if step.std > 0 else 0.0
            trajectory.append(step.mean + step.std * fresh)
        final = self.rest(velocity_fn, schedule, window, trajectory, velocities, seeds)
        sigmas = schedule.sigmas[window.start : window.stop + 1]
        latents, kept = torch.stack(trajectory, 1), torch.stack(velocities, 1)  # (P, W + 1 or W, G, C, H, W)
        return [SdeRollout(group, sigmas, end, own) for group, end, own in zip(latents, final, kept, strict=True)]

    def rest(
        self,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        window: range,
        trajectory: list[Tensor],
        velocities: list[Tensor],
        seeds: Sequence[int],
    ) -> Tensor:
        """Solve what follows the window: Euler steps to sigma 0, so that the last gives the clean prediction."""
        return euler(velocity_fn, trajectory[-1], schedule.sigmas[window.stop :])[-1]

    def starts(self, latent_shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
        """The initial noises, (P, G, C, H, W)."""
        if not self.shares_noise:
            return self.noises(latent_shape, seeds, "start")
        return group_noises(latent_shape, seeds, 1, "start").expand(-1, self.group_size, *latent_shape)

    def noises(self, latent_shape: tuple[int, ...], seeds: Sequence[int], *labels: object) -> Tensor:
        """Standard normal noise of every sample, (P, G, C, H, W): a function of the group's seed and its number."""
        return group_noises(latent_shape, seeds, self.group_size, *labels)

    def advantages(self, batch: RewardBatch) -> Tensor:
        """Rewards minus their group's mean, divided by the group's unbiased standard deviation: (P, G)."""
        return self.standardised(batch.rewards, batch.valid)

    def standardised(self, rewards: Tensor, valid: Tensor, min_spread: float = 0.0) -> Tensor:
        """Rewards in units of their row's unbiased standard deviation, held within `max_advantage`: (P, G) float64."""
        count = valid.sum(1, keepdim=True).double()
        unbiased = ((count - 1).clamp(min=0) / count.clamp(min=1)).sqrt()  # what divides by the population's otherwise
        limit = self.config.max_advantage
        return (unbiased * group_advantages(rewards, 2.0, valid, min_spread)).clamp(-limit, limit)

    def updates(self, advantages: Tensor, seed: int, iteration: int) -> list[list[Transition]]:
        """All samples that have an advantage, dealt out to the updates, each with its trained steps."""
        samples = with_advantage(advantages)
        window = len(self.window(iteration))
        return deal(samples, window, self.steps_trained(window), self.config.updates_per_rollout, seed)

    def loss(
        self, rollout: Rollout, advantages: Tensor, transition: Transition, velocities: Velocities
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Minus the clipped objective of one step of one sample, and what it strays from the base model."""
        assert isinstance(rollout, SdeRollout)
        _, sample, index = transition
        one, current = slice(sample, sample + 1), velocities.current
        kept = beside(rollout.velocities[index, one], current)  # (1, C, H, W)
        step = self.step(beside(rollout.latents[index, one], current), kept, rollout.sigmas, index)
        noise = (beside(rollout.latents[index + 1, one], current) - step.mean) / step.std
        old = kept if velocities.old is None else velocities.old[None]
        displacement = step.velocity_coefficient * (current[None] - old)
        log_ratio = self.log_ratio(noise, displacement, step.std)  # (1,)
        objective, held = clipped_objective(log_ratio, beside(advantages[one], current), self.config.clip_range)
        loss = -objective * self.loss_weight(rollout.sigmas, index)
        if velocities.reference is not None:
            drift = step.velocity_coefficient * (current - velocities.reference)
            loss = loss + self.config.reference_weight * self.divergence(drift, step.std, rollout.sigmas, index)
        values = (held.double().mean(), log_ratio.detach().abs().max())
        return loss, dict(zip(self.metric_names, values, strict=True))

    def log_ratio(self, noise: Tensor, displacement: Tensor, std: float) -> Tensor:
        """The log-ratio of one step, (1, C, H, W) -> (1,)."""
        return sde.log_ratio(noise, displacement, std)

    def loss_weight(self, sigmas: Tensor, index: int) -> float:
        """What the objective of a step is multiplied by."""
        return 1.0

    def divergence(self, drift: Tensor, std: float, sigmas: Tensor, index: int) -> Tensor:
        """KL divergence of two steps whose means differ by `drift`, averaged over dimensions: `drift^2 / (2 std^2)`."""
        return drift.double().square().mean() / (2 * std**2)
