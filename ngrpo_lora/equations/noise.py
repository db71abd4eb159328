"""Initial noises and their neighbourhood (Neighbor GRPO, Eq. 7), as pure functions of seeds and tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from ngrpo_lora.seeds import SEEDS, derive_seed


def gaussian_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32 noise drawn on the CPU with a generator of its own, as diffusers and ComfyUI do.

    Args:
        seed: any whole number, NumPy's too, that a generator takes.
    Raises:
        ValueError: it is beyond them.
    """
    number = index(seed)
    if not -SEEDS // 2 <= number < SEEDS:
        raise ValueError(f"seed must be from -2**63 to 2**64 - 1, got {seed}")
    generator = torch.Generator("cpu").manual_seed(number)
    # Said and not left to torch's defaults, which a reward may change for the whole process while this is drawn.
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def neighbor_noise(base: Tensor, deltas: Tensor, perturbation_strength: float) -> Tensor:
    """Perturb one noise into G neighbours: `noise_i = sqrt(1 - r^2) * base + r * delta_i` (Eq. 7).

    Standard normal inputs give standard normal neighbours whose correlation is `1 - r^2`.

    Args:
        base: (...), the base noise epsilon*.
        deltas: (G, ...), independent noises.
        perturbation_strength: r in (0, 1], the paper's sigma.
    Returns:
        (G, ...).
    Raises:
        ValueError: r outside (0, 1], or shapes that do not agree.
    """
    if not 0 < perturbation_strength <= 1:
        raise ValueError(f"perturbation_strength must be in (0, 1], got {perturbation_strength}")
    if deltas.shape[1:] != base.shape:
        raise ValueError(f"deltas must be (G, *base.shape), got {tuple(deltas.shape)} for base {tuple(base.shape)}")
    return math.sqrt(1 - perturbation_strength**2) * base + perturbation_strength * deltas


def group_noises(shape: Sequence[int], seeds: Sequence[int], group_size: int, *labels: object) -> Tensor:
    """Independent noises of P groups of G samples, (P, G, *shape).

    Each is a function of its group's seed, the labels and the sample's number, whatever else is drawn.
    """
    groups = [
        [gaussian_noise(shape, derive_seed(seed, *labels, sample)) for sample in range(group_size)] for seed in seeds
    ]
    return torch.stack([torch.stack(group) for group in groups])
