"""Flow-GRPO (arXiv 2505.05470): every sample is its own stochastic trajectory, and every step of it is trained.

Samples start at independent noises. Advantages have their group's mean and the standard deviation of all rewards.
Source: the paper and its code at 54809b5; `step: cps` is Flow-CPS (arXiv 2509.05952), `guard` GRPO-Guard
(arXiv 2510.22319). Departures are those of `_sde.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ngrpo_lora.algorithms._sde import SdeAlgorithm
from ngrpo_lora.algorithms._steps import check_steps
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.config.algorithms.flow_grpo import Config
from ngrpo_lora.equations import sde
from ngrpo_lora.equations.advantages import globally_scaled_advantages
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import VelocityFn
from ngrpo_lora.types import RewardBatch


class Algorithm(SdeAlgorithm[Config]):
    """See `_base.Algorithm` for the contract."""

    shares_noise = False

    def __init__(self, config: Config, rollout: RolloutConfig, steps: range | None = None):
        super().__init__(config, rollout, steps)
        check_steps("algorithm.num_train_steps", config.num_train_steps, self.trainable, rollout)

    def window(self, iteration: int) -> range:
        """The steps that may be trained: all but the last, which has no noise or noise that stays in the picture."""
        return self.trainable

    def steps_trained(self, window: int) -> int:
        """How many of the `window` steps are trained for each sample: `num_train_steps` of them, or all."""
        return self.config.num_train_steps or window

    def step(self, latents: Tensor, velocity: Tensor, sigmas: Tensor, index: int) -> sde.SdeStep:
        """Flow-GRPO's Gaussian, or that of coefficients-preserving sampling."""
        sigma, sigma_next = sigmas[index].item(), sigmas[index + 1].item()
        if self.config.step == "cps":
            return sde.cps_step(latents, velocity, sigma, sigma_next, self.config.eta)
        return sde.flow_sde_step(latents, velocity, sigma, sigma_next, self.config.eta, sigmas[1].item())

    def rest(
        self,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        window: range,
        trajectory: list[Tensor],
        velocities: list[Tensor],
        seeds: Sequence[int],
    ) -> Tensor:
        """What is not trained: Euler's steps, or the last one with noise that stays in the picture, as published."""
        if not self.config.noise_last_step or window.stop < self.num_steps - 1:
            return super().rest(velocity_fn, schedule, window, trajectory, velocities, seeds)
        latents, last = trajectory[-1], window.stop
        step = self.step(latents, velocity_fn(latents, schedule.sigmas[last].item()), schedule.sigmas, last)
        if step.std == 0:
            return step.mean
        fresh = self.noises(tuple(latents.shape[2:]), seeds, "step", last)
        return step.mean + step.std * fresh.to(latents.device)

    def advantages(self, batch: RewardBatch) -> Tensor:
        """Rewards minus their group's mean, divided by the standard deviation of all of them: (P, G)."""
        scaled = globally_scaled_advantages(batch.rewards, batch.valid)
        return scaled.clamp(-self.config.max_advantage, self.config.max_advantage)

    def log_ratio(self, noise: Tensor, displacement: Tensor, std: float) -> Tensor:
        """The log-ratio of one step as Flow-GRPO, Flow-CPS or GRPO-Guard has it, (1, C, H, W) -> (1,)."""
        if self.config.guard:
            return sde.guard_log_ratio(noise, displacement)
        return (sde.cps_log_ratio if self.config.step == "cps" else sde.log_ratio)(noise, displacement, std)

    def loss_weight(self, sigmas: Tensor, index: int) -> float:
        """GRPO-Guard divides by the step's length, so that every noise level has a gradient of like size."""
        return 1 / (sigmas[index] - sigmas[index + 1]).item() if self.config.guard else 1.0

    def divergence(self, drift: Tensor, std: float, sigmas: Tensor, index: int) -> Tensor:
        """Mean of `drift^2 / (2 s^2)` with the published s: the diffusion, without the root of the step's length."""
        length = 1.0 if self.config.step == "cps" else (sigmas[index] - sigmas[index + 1]).item()
        return super().divergence(drift, std, sigmas, index) * length
