"""What flows through the trainer: text embeddings, rollouts, reward batches and transitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class TextEmbeds:
    """A family's conditioning by name, each tensor (B, ...); rows are prompts."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Sequence[int]) -> TextEmbeds:
        return TextEmbeds({name: tensor[list(rows)] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> TextEmbeds:
        """These on another device, but for what decides shapes (`lengths`, of every kind), which stays on the CPU."""
        return TextEmbeds({name: x if name.endswith("lengths") else x.to(device) for name, x in self.tensors.items()})

    @classmethod
    def join(cls, alone: Sequence[dict[str, Tensor]]) -> TextEmbeds:
        """Conditionings of single prompts, each (1, ...), as rows; shorter sequences are padded with zeros."""
        names = alone[0] if alone else {}
        return cls({name: _join([one[name] for one in alone]) for name in names})


def _join(tensors: Sequence[Tensor]) -> Tensor:
    longest = max(tensor.shape[1] for tensor in tensors) if tensors[0].ndim > 1 else 0
    if all(tensor.ndim == 1 or tensor.shape[1] == longest for tensor in tensors):
        return torch.cat([*tensors])
    joined = tensors[0].new_zeros(len(tensors), longest, *tensors[0].shape[2:])
    for row, tensor in enumerate(tensors):
        joined[row, : tensor.shape[1]] = tensor[0]
    return joined


@dataclass(frozen=True)
class Rollout:
    """One group of candidates under the old weights.

    latents: (W + 1, G, C, H, W) float32, from noise on: the starts and ends of the W steps that may be trained.
    sigmas: (K + 1,) float32.
    final: (G, C, H, W) float32, clean.
    """

    latents: Tensor
    sigmas: Tensor
    final: Tensor

    @cached_property
    def finite(self) -> Tensor:
        """(G,) bool: the samples whose latents are finite to the end; the others have failed."""
        return are_finite(self.final.flatten(1))

    def to(self, device: torch.device | str) -> Self:
        """This rollout with all its tensors on another device.

        What a CUDA GPU gives goes to page-locked memory, and is there once that GPU has been waited for.
        """
        soon = self.final.is_cuda  # elsewhere, as on Apple's GPUs, a copy that is not waited for may be read too early
        return replace(
            self, **{field.name: getattr(self, field.name).to(device, non_blocking=soon) for field in fields(self)}
        )


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of P groups of G candidates, and the scores that they are made of.

    rewards: (P, G) float64, what the advantages are made of.
    valid: (P, G) bool, False where a reward failed.
    scores: raw scores of each reward by name, (P, G), NaN where it failed.
    """

    rewards: Tensor
    valid: Tensor
    scores: dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """N images and what they should show; each `group_size` in a row are candidates of one prompt.

    videos: N, all frames of the video that each image is a frame of, one object for all images of a video; empty where
    the images are no frames.
    """

    images: Sequence[Image.Image]
    prompts: Sequence[str]
    metadata: Sequence[dict[str, Any]]
    group_size: int = 1
    videos: Sequence[Sequence[Image.Image]] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Sequence[int]) -> Samples:
        images, videos = [self.images[row] for row in rows], [self.videos[row] for row in rows if self.videos]
        prompts, metadata = [self.prompts[row] for row in rows], [self.metadata[row] for row in rows]
        return Samples(images, prompts, metadata, self.group_size, videos)

    def video(self, row: int) -> Sequence[Image.Image]:
        """All frames of the video that an image is of; of a picture itself alone."""
        return self.videos[row] if self.videos else [self.images[row]]


class Transition(NamedTuple):
    """One step of one sample of one group: the unit of a policy update."""

    group: int
    sample: int
    step: int


class Velocities(NamedTuple):
    """Velocities (C, H, W) at the start of a transition.

    current: under the weights being optimised, with gradient.
    old: under the weights that made the rollout; None in later updates unless the algorithm asks for it.
    reference: under the base model; None unless the algorithm asks for it.
    """

    current: Tensor
    old: Tensor | None
    reference: Tensor | None = None

    def at(self, rows: int | slice | None) -> Velocities:
        """Those of some transitions of a micro-batch, (M, C, H, W); None makes one of a single transition's."""
        old, reference = (None if some is None else some[rows] for some in (self.old, self.reference))
        return Velocities(self.current[rows], old, reference)


def are_finite(rows: Tensor) -> Tensor:
    """Whether all values of each row are finite: (..., D) of at most 32 bits, or sums of such -> (...) bool."""
    return exact(rows).sum(-1, dtype=torch.float64).isfinite()  # no such sum overflows; 20 times as fast as each value


def exact(tensor: Tensor) -> Tensor:
    """The tensor where float64 can be had: on its own device, but for Apple's GPUs."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def beside(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor on another one's device, without waiting for what that device is about."""
    return tensor.to(other.device, non_blocking=True)


Metrics = dict[str, float]


def mean_metrics(rows: Tensor, names: Sequence[str]) -> Metrics:
    """Average (N, names) by name, but take the maximum of what is called `max_...`; NaN where there are no rows."""
    rows = rows if len(rows) else torch.full((1, len(names)), torch.nan)
    columns = zip(names, rows.double().unbind(1), strict=True)
    return {name: (c.max() if "max_" in name else c.mean()).item() for name, c in columns}
