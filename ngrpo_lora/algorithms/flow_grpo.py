"""Flow-GRPO (arXiv 2505.05470): every sample is its own stochastic trajectory, and every step of it is trained.

    x' = mean(x, v) + std * noise,   log pi = log N(x'; mean, std^2), averaged over dimensions

Advantages have their group's mean and the standard deviation of all rewards. Source: the paper and its code at
54809b5; `step: cps` is Flow-CPS (arXiv 2509.05952).

Departures:
- Log-ratios come from the difference of velocities, not of two log-probabilities (`equations/sde.py`): they are
  exactly 0 at the old weights.
- A group without advantages gives no transition; in the code its transitions have a gradient of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.config.algorithms.flow_grpo import Config
from ngrpo_lora.equations import sde
from ngrpo_lora.equations.advantages import group_advantages
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import VelocityFn, pairs
from ngrpo_lora.equations.surrogate import clipped_objective
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.types import Metrics, RewardBatch, Rollout, Transition, Velocities


@dataclass(frozen=True)
class FlowRollout(Rollout):
    """A rollout with the velocities at the starts of its W trained steps, velocities: (W, G, C, H, W) float32."""

    velocities: Tensor


class Algorithm:
    """See `_base.Algorithm` for the contract."""

    needs_old = False  # the rollout keeps its velocities
    metric_names = ("policy/clip_fraction", "policy/max_abs_log_ratio")

    def __init__(self, config: Config, rollout: RolloutConfig):
        self.config = config
        self.group_size, self.num_steps = rollout.group_size, rollout.num_steps
        self.needs_reference = config.reference_weight > 0

    def rollout(
        self,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        latent_shape: tuple[int, ...],
        seeds: Sequence[int],
        iteration: int,
        device: torch.device | str = "cpu",
    ) -> list[Rollout]:
        """Independent noises, followed by stochastic steps to the end."""
        latents, velocities = [self.noises(latent_shape, seeds, "start").to(device)], []
        for index, (sigma, _) in enumerate(pairs(schedule.sigmas)):
            velocities.append(velocity_fn(latents[-1], sigma))
            is_last = index == schedule.num_steps - 1
            eta = 0.0 if is_last and not self.config.noise_last_step else self.config.eta
            step = self.step(latents[-1], velocities[-1], schedule.sigmas, index, eta)
            fresh = self.noises(latent_shape, seeds, "step", index).to(device) if step.std > 0 else 0.0
            latents.append(step.mean + step.std * fresh)
        trained = torch.stack(latents[:-1], 1)  # (P, W + 1, G, C, H, W): all but the last step may be trained
        kept = torch.stack(velocities[:-1], 1)  # (P, W, G, C, H, W)
        return [
            FlowRollout(group, schedule.sigmas, final, own)
            for group, final, own in zip(trained, latents[-1], kept, strict=True)
        ]

    def noises(self, latent_shape: tuple[int, ...], seeds: Sequence[int], *labels: object) -> Tensor:
        """Standard normal noise of every sample, (P, G, C, H, W): a function of the group's seed and its number."""
        groups = [
            [gaussian_noise(latent_shape, derive_seed(seed, *labels, sample)) for sample in range(self.group_size)]
            for seed in seeds
        ]
        return torch.stack([torch.stack(group) for group in groups])

    def step(self, latents: Tensor, velocity: Tensor, sigmas: Tensor, index: int, eta: float) -> sde.SdeStep:
        """The Gaussian of latents (B, ...) after the `index`th step."""
        sigma, sigma_next = sigmas[index].item(), sigmas[index + 1].item()
        if self.config.step == "cps":
            return sde.cps_step(latents, velocity, sigma, sigma_next, eta)
        return sde.flow_sde_step(latents, velocity, sigma, sigma_next, eta, sigmas[1].item())

    def advantages(self, batch: RewardBatch) -> Tensor:
        """Rewards minus their group's mean, divided by the standard deviation of all of them: (P, G)."""
        kept = batch.rewards[batch.valid]
        deviation = kept.double().std(correction=0).item() if len(kept) else 0.0
        scaled = group_advantages(batch.rewards, None, batch.valid) / (deviation + 1e-4)
        return scaled.clamp(-self.config.max_advantage, self.config.max_advantage)

    def updates(self, advantages: Tensor, seed: int, iteration: int) -> list[list[Transition]]:
        """All samples of groups that have advantages, dealt out to the updates, each with its trained steps."""
        generator = torch.Generator().manual_seed(seed)
        updates: list[list[Transition]] = [[] for _ in range(self.config.updates_per_rollout)]
        samples = [(g, s) for g, row in enumerate(advantages) if row.any() for s in range(self.group_size)]
        count = self.config.num_train_steps or self.num_steps - 1
        for position, index in enumerate(torch.randperm(len(samples), generator=generator).tolist()):
            group, sample = samples[index]
            steps = torch.randperm(self.num_steps - 1, generator=generator)[:count].sort().values
            updates[position % len(updates)] += [Transition(group, sample, step) for step in steps.tolist()]
        return updates

    def loss(
        self, rollout: Rollout, advantages: Tensor, transition: Transition, velocities: Velocities
    ) -> tuple[Tensor, Metrics]:
        """Minus the clipped objective of one step of one sample, and what it strays from the base model."""
        assert isinstance(rollout, FlowRollout)
        _, sample, index = transition
        one = slice(sample, sample + 1)
        kept = rollout.velocities[index, one]  # (1, C, H, W)
        step = self.step(rollout.latents[index, one], kept, rollout.sigmas, index, self.config.eta)
        noise = (rollout.latents[index + 1, one] - step.mean) / step.std
        old = kept if velocities.old is None else velocities.old[None]
        displacement = step.velocity_coefficient * (velocities.current[None] - old)
        log_ratio_of = sde.cps_log_ratio if self.config.step == "cps" else sde.log_ratio
        log_ratio = log_ratio_of(noise, displacement, step.std)  # (1,)
        objective, held = clipped_objective(log_ratio, advantages[one], self.config.clip_range)
        loss = -objective
        if velocities.reference is not None:
            drift = step.velocity_coefficient * (velocities.current - velocities.reference)
            loss = loss + self.config.reference_weight * self.divergence(drift, step.std, rollout.sigmas, index)
        values = (held.double().mean(), log_ratio.detach().abs().max())
        return loss, dict(zip(self.metric_names, (value.item() for value in values), strict=True))

    def divergence(self, drift: Tensor, std: float, sigmas: Tensor, index: int) -> Tensor:
        """Mean of `drift^2 / (2 s^2)` with the published s: the diffusion, without the root of the step's length."""
        length = 1.0 if self.config.step == "cps" else (sigmas[index] - sigmas[index + 1]).item()
        return drift.double().square().mean() * length / (2 * std**2)
