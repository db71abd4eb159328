"""The contract between the trainer and an algorithm.

The trainer knows no algorithm by name. It calls, in this order and for P groups of one iteration:
`rollout`, `advantages` and `updates` once, and `loss` once a transition. An algorithm keeps nothing from one
iteration to the next, so that a resumed run goes on bit for bit: what depends on time depends on `iteration`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import VelocityFn
from ngrpo_lora.types import RewardBatch, Rollout, Transition, Velocities


class Algorithm(Protocol):
    """The contract of an algorithm: its rollout, advantages, transitions and loss; shapes as in `ngrpo_lora.types`.

    It is made with its settings, the rollout's and, where it can do with a part of the schedule, `steps: range`, the
    positions of the solver steps that can be trained: those at which the transformer with the adapter computes. One
    that takes no `steps` trains a model that has a single transformer alone.

    One that also has `losses`, with the arguments and results of the function below, is asked for a whole micro-batch.
    """

    needs_reference: bool
    """Whether `loss` reads the base model's velocity, which costs one more forward pass a transition."""

    needs_old: bool
    """Whether `loss` reads the old weights' velocity in the later updates of an iteration as well, which costs one
    more forward pass for each of their transitions. False where the rollout has kept what is needed of it."""

    metric_names: tuple[str, ...]
    """The `policy/...` metrics of every `loss`."""

    def rollout(
        self,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        latent_shape: tuple[int, ...],
        seeds: Sequence[int],
        iteration: int,
        device: torch.device | str = "cpu",
    ) -> list[Rollout]:
        """Draw P groups, one per seed: initial noises, which steps are stochastic, and how samples branch.

        `velocity_fn(latents, sigma)` takes (P, S, C, H, W), any number S of samples of every group, and keeps
        to the memory limits itself. Noise is drawn on the CPU; all else stays on `device` and never waits for it.
        A group is a function of its seed and of the iteration. An algorithm that needs more than latents later (its
        step noises, a tree) returns its own subclass of Rollout.
        """
        ...

    def advantages(self, batch: RewardBatch) -> Tensor:
        """(P, G) rewards -> (P, G), or (P, edges) for a tree: whatever `loss` reads."""
        ...

    def updates(self, advantages: Tensor, seed: int, iteration: int) -> list[list[Transition]]:
        """The transitions of every optimizer update of this iteration, in order; an update may be empty."""
        ...

    def loss(
        self, rollout: Rollout, advantages: Tensor, transition: Transition, velocities: Velocities
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of one transition (a scalar to be minimised) and its `policy/...` metrics, on the velocities' device.

        The rollout is in system memory, where it has all the room it needs; `types.beside` brings over what this
        transition is about. Nothing here should wait for the device (`item`, a mask as an index).
        """
        ...


def losses(
    algorithm: Algorithm,
    rollouts: Sequence[Rollout],
    advantages: Tensor,
    transitions: Sequence[Transition],
    velocities: Velocities,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Losses (M,) of M transitions, at least one, and their metrics by name, each (M,): at once, or one by one.

    Args:
        rollouts, advantages: of P groups, among which transitions count theirs.
        velocities: (M, C, H, W), those of all transitions.
    """
    if (together := getattr(algorithm, "losses", None)) is not None:
        return together(rollouts, advantages, transitions, velocities)
    alone = [
        algorithm.loss(rollouts[t.group], advantages[t.group], t, velocities.at(i)) for i, t in enumerate(transitions)
    ]
    device = velocities.current.device
    metrics = {
        name: torch.stack([torch.as_tensor(found[name], device=device) for _, found in alone])
        for name in algorithm.metric_names
    }
    return torch.stack([loss for loss, _ in alone]), metrics
