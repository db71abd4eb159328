"""Neighbor GRPO (arXiv 2511.16955): contrastive policy optimisation among deterministic trajectories.

Departures from the paper:
- The old anchor is by default the same one-step transition as the new one (`old_anchor: one_step`). Algorithm 1
  read literally compares a DDIM step with a DPM++ point (`rollout`): ratios then start far from 1.
- The distance is divided by a temperature; the paper's is 1, `auto` keeps the policy from saturating.
- `distance: clean` compares predictions of the clean image (as AR-CoPO, arXiv 2603.17461) in place of latents.
  Early latents are mostly noise, in which a candidate's reward does not show; and the old anchor is then a
  candidate itself, whatever the solver.
- The B * K transitions may be spread over several optimizer updates, and a pull towards the base model
  (the KL term of Eq. 4, as a squared displacement) may be added. Both are off by default.
- A group without advantages gives no transition; with `scale_rewards: batch` a group counts the more, the more its
  rewards differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ngrpo_lora.advantages import batch_deviation, group_advantages
from ngrpo_lora.config import AlgorithmConfig, RolloutConfig
from ngrpo_lora.noise import derive_seed, gaussian_noise, neighbor_noise
from ngrpo_lora.solvers import SOLVERS, VelocityFn
from ngrpo_lora.surrogate import auto_temperature, clipped_objective, leaping_log_ratio, leaping_logits
from ngrpo_lora.types import Metrics, RewardBatch, Rollout, Transition, Velocities


class Config(AlgorithmConfig, frozen=True):
    """Settings of Neighbor GRPO."""

    name: Literal["neighbor"] = "neighbor"
    perturbation_strength: float = Field(
        0.3, gt=0, le=1, description="Radius of the noise neighbourhood (sigma, Eq. 7)."
    )
    num_anchors: int = Field(4, ge=1, description="B: anchors per group, each one forward-backward pass a step.")
    num_train_steps: int = Field(4, ge=1, description="K: solver steps trained per anchor, drawn at random.")
    train_window: int | None = Field(
        None, ge=1, description="Trained steps are drawn from this many first ones, the noisiest; null: from all."
    )
    updates_per_rollout: int = Field(1, ge=1, description="Optimizer updates that share the B * K transitions.")
    clip_range: float = Field(1e-4, gt=0, lt=1, description="Clip of the policy ratio (epsilon, Eq. 9).")
    temperature: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="Divides squared distances; auto: the candidates' mean squared distance; the paper's is 1."
    )
    distance: Literal["latent", "clean"] = Field(
        "latent", description="What Eq. 8 compares: latents after the step, or predictions of the clean image at it."
    )
    old_anchor: Literal["one_step", "rollout"] = Field(
        "one_step", description="Old anchor: its one-step transition under old weights, or the rollout's own point."
    )
    advantage_p: float = Field(2.0, gt=0, le=2, description="Quasi-norm of the advantages (p, Eq. 11); 2: standard.")
    scale_rewards: Literal["group", "batch"] = Field(
        "group",
        description="Divide a group's centred rewards by their own quasi-norm (Eq. 11), or by the standard deviation "
        "of all groups of the iteration.",
    )
    min_reward_spread: float = Field(
        0.0, ge=0, description="A group whose rewards all lie within so many of these deviations is skipped."
    )
    reference_weight: float = Field(0.0, ge=0, description="Weight of the squared distance to the base model's step.")

    def check(self, rollout: RolloutConfig) -> None:
        """B <= G, K <= steps, updates <= B * K."""
        if self.num_anchors > rollout.group_size:
            raise ValueError(
                f"algorithm.num_anchors must be at most rollout.group_size ({rollout.group_size}), "
                f"got {self.num_anchors}; lower it or draw larger groups"
            )
        if self.num_train_steps > rollout.num_steps:
            raise ValueError(
                f"algorithm.num_train_steps must be at most rollout.num_steps ({rollout.num_steps}), "
                f"got {self.num_train_steps}; lower it or roll out with more steps"
            )
        if self.train_window is not None and not self.num_train_steps <= self.train_window <= rollout.num_steps:
            raise ValueError(
                f"algorithm.train_window must be from algorithm.num_train_steps ({self.num_train_steps}) to "
                f"rollout.num_steps ({rollout.num_steps}), got {self.train_window}; null trains all steps"
            )
        if self.updates_per_rollout > self.num_anchors * self.num_train_steps:
            raise ValueError(
                f"algorithm.updates_per_rollout must be at most num_anchors * num_train_steps "
                f"({self.num_anchors * self.num_train_steps}), got {self.updates_per_rollout}"
            )


@dataclass(frozen=True)
class NeighborRollout(Rollout):
    """A rollout with its predictions of the clean image, clean: (W, G, C, H, W)."""

    clean: Tensor


class Algorithm:
    """See `_base.Algorithm` for the contract."""

    metric_names = ("policy/clip_fraction", "policy/max_abs_log_ratio", "policy/entropy")

    def __init__(self, config: Config, rollout: RolloutConfig):
        self.config = config
        self.group_size, self.num_steps = rollout.group_size, rollout.num_steps
        self.solve = SOLVERS[rollout.solver]
        self.window = config.train_window or rollout.num_steps  # W
        self.needs_reference = config.reference_weight > 0

    def rollout(
        self,
        velocity_fn: VelocityFn,
        sigmas: Tensor,
        latent_shape: tuple[int, ...],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> list[Rollout]:
        """Neighbours of each group's noise (Eq. 7), followed by the deterministic solver to the end."""
        noise = torch.stack([self.neighborhood(latent_shape, seed) for seed in seeds]).to(device)  # (P, G, C, H, W)
        window, clean = self.window, []

        def recorded(latents: Tensor, sigma: float) -> Tensor:
            velocity = velocity_fn(latents, sigma)
            if self.config.distance == "clean" and len(clean) < window:
                clean.append(latents - sigma * velocity)
            return velocity

        steps = self.solve(recorded, noise, sigmas)
        latents, final = torch.stack(steps[: window + 1], 1), steps[-1]  # (P, W + 1, G, C, H, W), (P, G, C, H, W)
        if self.config.distance == "latent":
            return [Rollout(group, sigmas, end) for group, end in zip(latents, final, strict=True)]
        predictions = torch.stack(clean, 1)  # (P, W, G, C, H, W)
        return [
            NeighborRollout(group, sigmas, end, prediction)
            for group, end, prediction in zip(latents, final, predictions, strict=True)
        ]

    def neighborhood(self, latent_shape: tuple[int, ...], seed: int) -> Tensor:
        """The initial noises of one group, (G, C, H, W)."""
        base = gaussian_noise(latent_shape, derive_seed(seed, "base"))
        deltas = [gaussian_noise(latent_shape, derive_seed(seed, "delta", i)) for i in range(self.group_size)]
        return neighbor_noise(base, torch.stack(deltas), self.config.perturbation_strength)

    def advantages(self, batch: RewardBatch) -> Tensor:
        """Centred, divided by the group's L_p quasi-norm (Eq. 3, 11) or by the iteration's deviation: (P, G)."""
        deviation = batch_deviation(batch.rewards, batch.valid)
        min_spread = self.config.min_reward_spread * deviation
        if self.config.scale_rewards == "group":
            return group_advantages(batch.rewards, self.config.advantage_p, batch.valid, min_spread)
        return group_advantages(batch.rewards, None, batch.valid, min_spread) / (deviation or 1.0)

    def updates(self, advantages: Tensor, seed: int) -> list[list[Transition]]:
        """B anchors a group that has advantages (symmetric sampling), K steps each, dealt out to the updates."""
        generator = torch.Generator().manual_seed(seed)
        updates: list[list[Transition]] = [[] for _ in range(self.config.updates_per_rollout)]
        for group, row in enumerate(advantages):
            anchors = torch.randperm(self.group_size, generator=generator)[: self.config.num_anchors]
            if not row.any():
                continue
            transitions = [
                Transition(group, anchor, step)
                for anchor in anchors.tolist()
                for step in torch.randperm(self.window, generator=generator)[: self.config.num_train_steps].tolist()
            ]
            for position, index in enumerate(torch.randperm(len(transitions), generator=generator).tolist()):
                updates[position % len(updates)].append(transitions[index])
        return updates

    def loss(
        self, rollout: Rollout, advantages: Tensor, transition: Transition, velocities: Velocities
    ) -> tuple[Tensor, Metrics]:
        """Minus the clipped objective of one anchor at one step (Eq. 8 to 10)."""
        config, (_, anchor, step) = self.config, transition
        if config.distance == "clean":
            assert isinstance(rollout, NeighborRollout)
            scale = -rollout.sigmas[step]  # x_theta = latents - sigma * v
            candidates = rollout.clean[step]  # (G, C, H, W)
        else:
            scale = rollout.sigmas[step + 1] - rollout.sigmas[step]  # x_theta = latents + dt * v
            candidates = rollout.latents[step + 1]
        anchor_old = rollout.latents[step, anchor] + scale * velocities.old  # (C, H, W)
        displacement = scale * (velocities.current - velocities.old)
        if config.old_anchor == "rollout":
            displacement = displacement + (anchor_old - candidates[anchor])
            anchor_old = candidates[anchor]
        tau = auto_temperature(candidates) if config.temperature == "auto" else config.temperature
        log_ratio = leaping_log_ratio(candidates, anchor_old, displacement, tau)  # (G,)
        objective, held = clipped_objective(log_ratio, advantages, config.clip_range)
        loss = -objective
        if velocities.reference is not None:
            drift = scale * (velocities.current - velocities.reference)
            loss = loss + config.reference_weight * drift.square().sum(dtype=torch.float64) / tau
        policy = torch.softmax(leaping_logits(candidates, anchor_old, tau), 0)
        values = (held.double().mean(), log_ratio.detach().abs().max(), torch.special.entr(policy).sum())
        return loss, dict(zip(self.metric_names, (value.item() for value in values), strict=True))
