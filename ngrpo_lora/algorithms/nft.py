"""DiffusionNFT (arXiv 2509.16117): the forward process learns from good samples and unlearns bad ones.

    v+ = b v + (1 - b) v_old,   v- = (1 + b) v_old - b v,   x+- = x - sigma v+-
    loss = c / b * mean[ r |x+ - clean|^2 / w+ + (1 - r) |x- - clean|^2 / w- ],   r = (A / c + 1) / 2 within [0, 1]

with `w = mean |x+- - clean|` as a constant. Source: the paper and its code at 24af555. Departure: samples are drawn
with the very weights that are trained (its decay of type 0), not with a slower average of them; a sample without an
advantage is left out, and not reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ngrpo_lora.algorithms._dealing import deal, with_advantage
from ngrpo_lora.algorithms._forward import ForwardAlgorithm, clean_error
from ngrpo_lora.algorithms._steps import before_last, check_steps
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.config.algorithms.nft import Config
from ngrpo_lora.equations.advantages import globally_scaled_advantages
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.types import RewardBatch, Rollout, Transition, Velocities, beside

MIN_SCALE = 1e-5


class Algorithm(ForwardAlgorithm[Config]):
    """See `_base.Algorithm` for the contract."""

    needs_old = True
    metric_names = ("policy/positive_error", "policy/negative_error")

    def __init__(self, config: Config, rollout: RolloutConfig, steps: range | None = None):
        super().__init__(config, rollout)
        self.trainable = before_last(steps, rollout.num_steps)
        check_steps("algorithm.num_train_steps", config.num_train_steps, self.trainable, rollout)

    def levels(self, schedule: Schedule, seed: int) -> Tensor:
        """The schedule's own noise levels at which steps start, but the last."""
        return schedule.sigmas[self.trainable.start : self.trainable.stop]

    def advantages(self, batch: RewardBatch) -> Tensor:
        """Rewards minus their group's mean, divided by the standard deviation of all of them: (P, G)."""
        scaled = globally_scaled_advantages(batch.rewards, batch.valid)
        return scaled.clamp(-self.config.max_advantage, self.config.max_advantage)

    def updates(self, advantages: Tensor, seed: int, iteration: int) -> list[list[Transition]]:
        """All samples that have an advantage, dealt out to the updates, each with its noise levels."""
        levels = len(self.trainable)
        return deal(
            with_advantage(advantages),
            levels,
            self.config.num_train_steps or levels,
            self.config.updates_per_rollout,
            seed,
        )

    def loss(
        self, rollout: Rollout, advantages: Tensor, transition: Transition, velocities: Velocities
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one sample at one noise level."""
        assert velocities.old is not None  # needs_old
        config, (_, sample, level) = self.config, transition
        current, old = velocities.current, velocities.old
        goodness = (advantages[sample].item() / config.max_advantage + 1) / 2  # r
        moved = config.mixture * (current - old)
        latents, sigma = beside(rollout.latents[level, sample], current), rollout.sigmas[level].item()
        clean = beside(rollout.final[sample], current)
        positive, negative = (clean_error(latents, velocity, sigma, clean) for velocity in (old + moved, old - moved))
        loss = goodness * self_scaled(positive) + (1 - goodness) * self_scaled(negative)
        loss = self.pulled(loss * config.max_advantage / config.mixture, velocities)
        values = (positive.detach().square().mean(), negative.detach().square().mean())
        return loss, dict(zip(self.metric_names, values, strict=True))


def self_scaled(error: Tensor) -> Tensor:
    """Mean squared error divided by the mean absolute error, which counts as a constant."""
    return error.square().mean() / error.detach().abs().mean().clamp(min=MIN_SCALE)
