"""BranchGRPO (arXiv 2509.06040): a group is a tree of stochastic steps, whose leaves are its samples.

    nodes at the start of a step:  1  2  2  2  4  4  4  8 ...   (a split every third step)

All steps are DanceGRPO's; at a split the noise is stronger than their log-probability knows of, as published. A node is
worth the mean of its leaves; an edge has the advantage of the node that it leads to among all nodes of its depth.
Source: the paper and its code for FLUX.

Here a trajectory is kept for every leaf, and an edge is a transition of the first leaf below it. Departures, beside
those of `_sde.py`: leaves are not weighted by the probability of their paths, and edges are dealt out to a number of
updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ngrpo_lora.algorithms._sde import SdeAlgorithm, SdeRollout
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.config.algorithms.branch import Config
from ngrpo_lora.equations import sde
from ngrpo_lora.equations.noise import group_noises
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import VelocityFn
from ngrpo_lora.types import RewardBatch, Rollout, Transition, Velocities

MIN_SPREAD = 1e-6
"""Nodes of one depth whose worth differs by no more are alike: sums of rewards round."""


class Algorithm(SdeAlgorithm[Config]):
    """See `_base.Algorithm` for the contract."""

    def __init__(self, config: Config, rollout: RolloutConfig):
        super().__init__(config, rollout)
        self.splits = config.splits(rollout)

    def window(self, iteration: int) -> range:
        """All steps; pictures are the clean predictions of the last, whose own noise is seen by nobody but trained."""
        return range(self.num_steps)

    def step(self, latents: Tensor, velocity: Tensor, sigmas: Tensor, index: int) -> sde.SdeStep:
        """The Gaussian step of DanceGRPO, which BranchGRPO takes where its tree branches."""
        return sde.dance_step(latents, velocity, sigmas[index].item(), sigmas[index + 1].item(), self.config.eta)

    def nodes(self, index: int) -> int:
        """How many nodes there are at the start of a step: 2 to the number of splits before it."""
        return 2 ** sum(split < index for split in self.splits)

    def rollout(
        self,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        latent_shape: tuple[int, ...],
        seeds: Sequence[int],
        iteration: int,
        device: torch.device | str = "cpu",
    ) -> list[Rollout]:
        """Grow the tree from one noise; a node is evaluated once, however many leaves are below it."""
        nodes = self.starts(latent_shape, seeds)[:, :1].to(device)  # (P, N, C, H, W)
        trajectory, velocities, final = [nodes], [], nodes
        for index, sigma in enumerate(schedule.sigmas[:-1].tolist()):
            velocities.append(velocity_fn(nodes, sigma))
            final = nodes - sigma * velocities[-1]
            step = self.step(nodes, velocities[-1], schedule.sigmas, index)
            children = self.nodes(index + 1)
            fresh = group_noises(latent_shape, seeds, children, "step", index).to(device)
            strength = step.std * (self.config.split_noise if index in self.splits else 1.0)
            nodes = step.mean.repeat_interleave(children // self.nodes(index), 1) + strength * fresh
            trajectory.append(nodes)
        latents, kept = (torch.stack([*map(self.of_leaves, tree)], 1) for tree in (trajectory, velocities))
        return [
            SdeRollout(group, schedule.sigmas, end, own) for group, end, own in zip(latents, final, kept, strict=True)
        ]

    def of_leaves(self, nodes: Tensor) -> Tensor:
        """What every leaf has of its ancestor among N nodes, (P, N, ...) -> (P, G, ...)."""
        return nodes.repeat_interleave(self.group_size // nodes.shape[1], 1)

    def advantages(self, batch: RewardBatch) -> Tensor:
        """Each edge's advantage among those of its depth, (P, G) -> (P, K * G): of step k and leaf i at k * G + i."""
        rewards, valid, depths = batch.rewards.double(), batch.valid, []
        for index in range(self.num_steps):
            shape = (len(rewards), self.nodes(index + 1), -1)
            count = valid.view(shape).sum(2)
            mean = rewards.where(valid, 0.0).view(shape).sum(2) / count.clamp(min=1)  # (P, N)
            depths.append(self.of_leaves(self.standardised(mean, count > 0, MIN_SPREAD)))
        return torch.stack(depths, 1).flatten(1)

    def updates(self, advantages: Tensor, seed: int, iteration: int) -> list[list[Transition]]:
        """All edges that have an advantage, but for those that are pruned, shuffled and dealt out."""
        generator = torch.Generator().manual_seed(seed)
        updates: list[list[Transition]] = [[] for _ in range(self.config.updates_per_rollout)]
        edges = [edge for group, row in enumerate(advantages) for edge in self.edges(group, row)]
        for position, index in enumerate(torch.randperm(len(edges), generator=generator).tolist()):
            updates[position % len(updates)].append(edges[index])
        return updates

    def edges(self, group: int, advantages: Tensor) -> list[Transition]:
        """The trained edges of one tree, each once, as a step of the first leaf below it."""
        by_step = advantages.view(-1, self.group_size)
        ranked = by_step[-1].argsort(descending=True, stable=True).tolist()
        by_leaf = [leaf for leaf in ranked if by_step[-1, leaf] != 0]  # without those that failed
        kept = {"all": [*range(self.group_size)], "half": by_leaf[: -(-len(by_leaf) // 2)]}
        kept["extremes"] = [by_leaf[0], by_leaf[-1]] if by_leaf else []
        edges: list[Transition] = []
        for index in range(self.num_steps - self.config.pruned_steps):
            below = self.group_size // self.nodes(index + 1)
            firsts = sorted({leaf // below * below for leaf in kept[self.config.kept_leaves]})
            edges += [Transition(group, leaf, index) for leaf in firsts if by_step[index, leaf] != 0]
        return edges

    def loss(
        self, rollout: Rollout, advantages: Tensor, transition: Transition, velocities: Velocities
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Minus the clipped objective of one edge."""
        return super().loss(rollout, advantages.view(-1, self.group_size)[transition.step], transition, velocities)
