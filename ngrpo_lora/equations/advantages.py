"""Group advantages: standardisation (Eq. 3) and quasi-norm reweighting (Eq. 11)."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor, p: float | None = 2.0, valid: Tensor | None = None, min_spread: float = 0.0
) -> Tensor:
    """Centre rewards within each group and divide by their L_p quasi-norm: `sqrt(G) * A_i / (sum |A_k|^p)^(1/p)`.

    Source: Neighbor GRPO, Eq. 11. The constant sqrt(G) makes p = 2 exactly Eq. 3 with the population
    standard deviation; p < 2 mutes groups whose advantages are flat.

    Args:
        rewards: (P, G), any scale.
        p: in (0, 2]; None leaves the centred rewards on their own scale (Dr. GRPO, arXiv 2503.20783).
        valid: (P, G) bool; a reward that failed is False, gets 0 and does not count in its group.
        min_spread: a group whose rewards lie within this range carries no signal and gets 0.
    Returns:
        (P, G) float64; a group of equal rewards gives exactly 0.
    Raises:
        ValueError: not (P, G >= 2), a valid reward that is not finite, p outside (0, 2], or a spread below 0.
    """
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    if rewards.ndim != 2 or rewards.shape[1] < 2 or not rewards[valid].isfinite().all():
        raise ValueError(f"rewards must be finite and (P, G >= 2), got {rewards}")
    if p is not None and not 0 < p <= 2:
        raise ValueError(f"p must be in (0, 2], got {p}")
    if not min_spread >= 0:
        raise ValueError(f"min_spread must be 0 or more, got {min_spread}")
    rewards = rewards.double()
    count = valid.sum(1, keepdim=True)  # (P, 1)
    mean = rewards.where(valid, 0.0).sum(1, keepdim=True) / count.clamp(min=1)  # (P, 1)
    centered = (rewards - mean).where(valid, 0.0)  # (P, G)
    # Rounding leaves equal rewards a tiny non-zero deviation, so equality is read from the spread.
    informative = (count >= 2) & (reward_spread(rewards, valid) > min_spread)  # (P, 1)
    if p is None:
        return centered.where(informative, 0.0)
    largest = centered.abs().amax(1, keepdim=True).where(informative, 1.0)  # keeps the powers in range
    scaled = centered / largest
    norm = scaled.abs().pow(p).sum(1, keepdim=True).pow(1 / p)  # (P, 1)
    return torch.where(informative, count.sqrt() * scaled / norm.where(informative, 1.0), 0.0)


def globally_scaled_advantages(rewards: Tensor, valid: Tensor) -> Tensor:
    """Centre rewards within each group and divide by the standard deviation of all of them, plus 1e-4.

    Source: Flow-GRPO (arXiv 2505.05470) and DiffusionNFT (arXiv 2509.16117), whose code takes the deviation of the
    whole iteration's rewards, not centred by group.

    Args:
        rewards, valid: (P, G), as for `group_advantages`.
    Returns:
        (P, G) float64; a group of equal rewards gives exactly 0.
    """
    kept = rewards[valid].double()
    deviation = kept.std(correction=0).item() if len(kept) else 0.0
    return group_advantages(rewards, None, valid) / (deviation + 1e-4)


def batch_deviation(rewards: Tensor, valid: Tensor) -> float:
    """Standard deviation of valid rewards about their group's mean, over all groups: (P, G) -> scalar.

    It measures rewards on their own scale; 0 where all groups are flat.
    """
    kept = rewards.double().where(valid, torch.nan)
    return (kept - kept.nanmean(1, keepdim=True)).square().nanmean().sqrt().nan_to_num().item()


def reward_spread(rewards: Tensor, valid: Tensor) -> Tensor:
    """Largest minus smallest valid reward of each group, (P, G) -> (P, 1); -inf where none is valid."""
    low = rewards.where(valid, torch.inf).amin(1, keepdim=True)
    return rewards.where(valid, -torch.inf).amax(1, keepdim=True) - low
