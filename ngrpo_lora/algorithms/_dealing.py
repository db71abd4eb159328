"""Deals samples out to the updates of an iteration, each sample with steps that are drawn for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ngrpo_lora.types import Transition


def with_advantage(advantages: Tensor) -> list[tuple[int, int]]:
    """(group, sample) of every sample whose advantage is not 0, (P, G) -> at most P * G pairs.

    The others failed, or belong to a group of equal rewards, or are worth exactly the mean: nothing is learned of them.
    """
    return [(group, sample) for group, sample in advantages.nonzero().tolist()]


def deal(
    samples: Sequence[tuple[int, int]], num_steps: int, num_trained: int, num_updates: int, seed: int
) -> list[list[Transition]]:
    """Shuffle (group, sample) pairs and deal them out in turn, each with `num_trained` of `num_steps` steps."""
    generator = torch.Generator().manual_seed(seed)
    updates: list[list[Transition]] = [[] for _ in range(num_updates)]
    for position, index in enumerate(torch.randperm(len(samples), generator=generator).tolist()):
        steps = torch.randperm(num_steps, generator=generator)[:num_trained].sort().values
        group, sample = samples[index]
        updates[position % num_updates] += [Transition(group, sample, step) for step in steps.tolist()]
    return updates
