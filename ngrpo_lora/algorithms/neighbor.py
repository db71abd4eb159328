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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngrpo_lora.algorithms._steps import check_steps
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.config.algorithms.neighbor import Config
from ngrpo_lora.equations.advantages import batch_deviation, group_advantages
from ngrpo_lora.equations.noise import gaussian_noise, neighbor_noise
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import SOLVERS, VelocityFn
from ngrpo_lora.equations.surrogate import clipped_objective, leap, mean_squared_distances
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.types import RewardBatch, Rollout, Transition, Velocities, beside

MAX_VALUES = 2**22
"""Candidates' values of the transitions that are compared at once: of a 64 px picture many, of a large one's one."""


@dataclass(frozen=True)
class NeighborRollout(Rollout):
    """A rollout with what its W steps are trained by.

    Its latents and its sigmas, both W + 1, are those of these steps alone.

    velocities: (W, G, C, H, W) float32 at their starts; (0, ...) where they are computed again.
    temperatures: (W,) float64, the mean squared distance between two candidates of each; (0,) where it is given.
    """

    velocities: Tensor
    temperatures: Tensor


class Algorithm:
    """See `_base.Algorithm` for the contract."""

    metric_names = ("policy/clip_fraction", "policy/max_abs_log_ratio", "policy/entropy")

    def __init__(self, config: Config, rollout: RolloutConfig, steps: range | None = None):
        self.config = config
        self.group_size, self.num_steps = rollout.group_size, rollout.num_steps
        self.solve = SOLVERS[rollout.solver]
        steps = steps or range(rollout.num_steps)
        check_steps("algorithm.train_window", config.train_window, steps, rollout)
        check_steps("algorithm.num_train_steps", config.num_train_steps, steps, rollout)
        self.window = steps[: config.train_window]  # W steps
        self.keeps_velocities = config.reuse_velocities or config.distance == "clean"
        self.needs_old = not config.reuse_velocities
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
        """Neighbours of each group's noise (Eq. 7), followed by the deterministic solver to the end."""
        noise = torch.stack([self.neighborhood(latent_shape, seed) for seed in seeds]).to(device)  # (P, G, C, H, W)
        window, velocities = self.window, []
        sigmas = schedule.sigmas[window.start : window.stop + 1]  # (W + 1,)
        trained = sigmas[:-1].tolist()

        def recorded(latents: Tensor, sigma: float) -> Tensor:
            velocity = velocity_fn(latents, sigma)
            if self.keeps_velocities and sigma in trained:
                velocities.append(velocity)
            return velocity

        points = self.solve(recorded, noise, schedule.sigmas)
        latents = torch.stack(points[window.start : window.stop + 1], 1)  # (P, W + 1, G, C, H, W)
        kept = torch.stack(velocities, 1) if velocities else latents[:, :0]  # (P, W or 0, G, C, H, W)
        return [
            self.with_temperatures(NeighborRollout(group, sigmas, end, own, sigmas[:0].double()))
            for group, end, own in zip(latents, points[-1], kept, strict=True)
        ]

    def with_temperatures(self, rollout: NeighborRollout) -> NeighborRollout:
        """The rollout with the temperature of each of its steps, where they are `auto`."""
        if self.config.temperature != "auto":
            return rollout
        steps, at_once = range(len(self.window)), max(1, MAX_VALUES // rollout.final.numel())
        found = [
            mean_squared_distances(torch.stack([self.candidates(rollout, step) for step in steps[first:][:at_once]]))
            for first in steps[::at_once]
        ]
        return replace(rollout, temperatures=torch.cat(found))

    def candidates(self, rollout: NeighborRollout, step: int) -> Tensor:
        """What the anchor of a step is compared with, (G, C, H, W): latents after it, or clean predictions at it."""
        if self.config.distance == "clean":
            return rollout.latents[step] - rollout.sigmas[step].item() * rollout.velocities[step]
        return rollout.latents[step + 1]

    def neighborhood(self, latent_shape: tuple[int, ...], seed: int) -> Tensor:
        """The initial noises of one group, (G, C, H, W)."""
        base = gaussian_noise(latent_shape, derive_seed(seed, "base"))
        pairs = self.config.antithetic_pairs
        count = self.group_size // 2 if pairs else self.group_size
        deltas = torch.stack([gaussian_noise(latent_shape, derive_seed(seed, "delta", i)) for i in range(count)])
        deltas = torch.stack([deltas, -deltas], 1).flatten(0, 1) if pairs else deltas
        return neighbor_noise(base, deltas, self.config.perturbation_strength)

    def advantages(self, batch: RewardBatch) -> Tensor:
        """Centred, divided by the group's L_p quasi-norm (Eq. 3, 11) or by the iteration's deviation: (P, G)."""
        deviation = batch_deviation(batch.rewards, batch.valid)
        min_spread = self.config.min_reward_spread * deviation
        if self.config.scale_rewards == "group":
            return group_advantages(batch.rewards, self.config.advantage_p, batch.valid, min_spread)
        return group_advantages(batch.rewards, None, batch.valid, min_spread) / (deviation or 1.0)

    def updates(self, advantages: Tensor, seed: int, iteration: int) -> list[list[Transition]]:
        """B anchors a group that has advantages (symmetric sampling), K steps each, dealt out to the updates."""
        generator, steps = torch.Generator().manual_seed(seed), len(self.window)
        updates: list[list[Transition]] = [[] for _ in range(self.config.updates_per_rollout)]
        for group, row in enumerate(advantages):
            order = torch.randperm(self.group_size, generator=generator)
            anchors = order[row[order] != 0][: self.config.num_anchors]  # none that failed, whose latents may be NaN
            transitions = [
                Transition(group, anchor, step)
                for anchor in anchors.tolist()
                for step in torch.randperm(steps, generator=generator)[: self.config.num_train_steps].tolist()
            ]
            for position, index in enumerate(torch.randperm(len(transitions), generator=generator).tolist()):
                updates[position % len(updates)].append(transitions[index])
        return updates

    def loss(
        self, rollout: Rollout, advantages: Tensor, transition: Transition, velocities: Velocities
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Minus the clipped objective of one anchor at one step (Eq. 8 to 10)."""
        alone = [transition._replace(group=0)]
        losses, metrics = self.losses([rollout], advantages[None], alone, velocities.at(None))
        return losses[0], {name: values[0] for name, values in metrics.items()}

    def losses(
        self,
        rollouts: Sequence[Rollout],
        advantages: Tensor,
        transitions: Sequence[Transition],
        velocities: Velocities,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The same of M transitions at once, as many at a time as make no difference to memory: see `_base.losses`."""
        at_once = max(1, MAX_VALUES // (self.group_size * velocities.current[0].numel()))
        found = []
        for start in range(0, len(transitions), at_once):
            some = slice(start, start + at_once)
            found.append(self.micro_batch(rollouts, advantages, transitions[some], velocities.at(some)))
        columns = [torch.cat(column) for column in zip(*found, strict=True)]
        return columns[0], dict(zip(self.metric_names, columns[1:], strict=True))

    def micro_batch(
        self,
        rollouts: Sequence[Rollout],
        advantages: Tensor,
        transitions: Sequence[Transition],
        velocities: Velocities,
    ) -> tuple[Tensor, ...]:
        """Losses (M,) and the values of each metric, (M,)."""
        config, current, old = self.config, velocities.current, velocities.old

        def gather(part: Callable[[NeighborRollout, Transition], Tensor]) -> Tensor:
            """A part of each transition's rollout, beside the velocities: (M, ...)."""
            parts = []
            for transition in transitions:
                rollout = rollouts[transition.group]
                assert isinstance(rollout, NeighborRollout)
                parts.append(part(rollout, transition))
            return beside(torch.stack(parts), current)

        scales = gather(lambda r, t: self.scale(r, t.step)).view(-1, *[1] * (current.ndim - 1))  # (M, 1, 1, 1)
        if old is None:  # of a later update
            old = gather(lambda r, t: r.velocities[t.step, t.sample])
        anchors = gather(lambda r, t: r.latents[t.step, t.sample]) + scales * old  # (M, C, H, W)
        candidates = gather(lambda r, t: self.candidates(r, t.step))  # (M, G, C, H, W)
        present = None
        if not all(rollouts[t.group].finite.all() for t in transitions):  # what is not has failed: no advantage
            present = gather(lambda r, t: r.finite)  # (M, G)
            candidates = candidates.where(present.view(*present.shape, *[1] * (current.ndim - 1)), anchors[:, None])
        displacements = scales * (current - old)
        if config.old_anchor == "rollout":
            points = candidates[range(len(transitions)), [t.sample for t in transitions]]
            displacements, anchors = displacements + (anchors - points), points
        automatic = config.temperature == "auto"
        tau = gather(lambda r, t: r.temperatures[t.step]).view(-1, 1) if automatic else float(config.temperature)
        log_ratio, log_old = leap(candidates, anchors, displacements, tau, present)  # (M, G)
        objective, held = clipped_objective(log_ratio, gather(lambda r, t: advantages[t.group]), config.clip_range)
        losses = -objective
        if velocities.reference is not None:
            losses = losses + config.reference_weight * self.drift(current - velocities.reference, scales, tau)
        if present is None:
            present = torch.ones_like(held)
        clipped = (held & present).sum(1) / present.sum(1)
        largest = log_ratio.detach().where(present, 0.0).abs().amax(1)
        return losses, clipped, largest, torch.special.entr(log_old.exp()).sum(1)

    def scale(self, rollout: Rollout, step: int) -> Tensor:
        """What turns a velocity into a clean prediction, `latents - sigma * v`, or into a step, `latents + dt * v`."""
        sigmas = rollout.sigmas
        return -sigmas[step] if self.config.distance == "clean" else sigmas[step + 1] - sigmas[step]

    def drift(self, strayed: Tensor, scales: Tensor, tau: Tensor | float) -> Tensor:
        """The squared distance to the base model that differences of velocities (M, C, H, W) make, (M,)."""
        if self.config.reference_distance == "velocity":
            return strayed.flatten(1).double().square().mean(1)
        return ((scales * strayed).flatten(1).square().sum(1, dtype=torch.float64)[:, None] / tau)[:, 0]
