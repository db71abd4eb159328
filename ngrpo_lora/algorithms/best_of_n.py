"""Best-of-N fine-tuning: flow matching on the best samples of each group, the baseline of every RL method.

    loss = mean |v - (fresh - clean)|^2   at random noise levels

It is rejection sampling, as in RAFT (arXiv 2304.06767), for flow matching: no policy, no ratio, no negative samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ngrpo_lora.algorithms._dealing import deal, with_advantage
from ngrpo_lora.algorithms._forward import ForwardAlgorithm, clean_error
from ngrpo_lora.config.algorithms.best_of_n import Config
from ngrpo_lora.equations.advantages import reward_spread
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import shifted
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.types import RewardBatch, Rollout, Transition, Velocities, beside


class Algorithm(ForwardAlgorithm[Config]):
    """See `_base.Algorithm` for the contract."""

    needs_old = False
    metric_names = ("policy/flow_matching_error",)

    def levels(self, schedule: Schedule, seed: int) -> Tensor:
        """`num_train_steps` noise levels: one from each equal part of [0, 1], or logit-normal, shifted."""
        count = self.config.num_train_steps
        generator = torch.Generator().manual_seed(derive_seed(seed, "levels"))
        if self.config.levels == "logit_normal":
            times = torch.randn(count, generator=generator, dtype=torch.float64).sigmoid()
        else:
            times = (1 + torch.arange(count) - torch.rand(count, generator=generator, dtype=torch.float64)) / count
        return shifted(times, schedule.shift).float()

    def advantages(self, batch: RewardBatch) -> Tensor:
        """1 for the best of each group, and 0 for the others and for groups of equal rewards: (P, G)."""
        ranked = batch.rewards.double().where(batch.valid, -torch.inf)
        best = torch.zeros_like(ranked).scatter(1, ranked.topk(self.config.num_best, dim=1).indices, 1.0)
        return best.where((reward_spread(batch.rewards, batch.valid) > 0) & batch.valid, 0.0)

    def updates(self, advantages: Tensor, seed: int, iteration: int) -> list[list[Transition]]:
        """The best samples, dealt out to the updates, each at all of its noise levels."""
        count = self.config.num_train_steps
        return deal(with_advantage(advantages), count, count, self.config.updates_per_rollout, seed)

    def loss(
        self, rollout: Rollout, advantages: Tensor, transition: Transition, velocities: Velocities
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The flow-matching loss of one sample at one noise level."""
        _, sample, level = transition
        sigma = rollout.sigmas[level].item()
        current = velocities.current
        latents, clean = beside(rollout.latents[level, sample], current), beside(rollout.final[sample], current)
        error = clean_error(latents, current, sigma, clean) / sigma
        loss = error.square().mean()
        return self.pulled(loss, velocities), {name: loss.detach() for name in self.metric_names}
