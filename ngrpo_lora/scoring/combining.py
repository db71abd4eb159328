"""Combines the scores of several rewards into one reward for each candidate, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.equations.advantages import reward_spread
from ngrpo_lora.types import Metrics, RewardBatch

__all__ = ["clipped", "combine", "correlations"]


def clipped(raw: Tensor, config: RewardConfig) -> Tensor:
    """Clamp raw scores to the reward's `clip`, where it has one."""
    return raw if config.clip is None else raw.clamp(*config.clip)


def combine(
    scores: dict[str, Tensor], configs: Sequence[RewardConfig], how: Literal["standardized", "raw"] = "standardized"
) -> RewardBatch:
    """Add up the rewards of each candidate, clipped and weighted.

    Args:
        scores: raw scores by label, each (P, G); what is not finite failed and is masked in its group.
        configs: weights and clips, by the same labels.
        how: `standardized` brings each of several rewards to mean 0 and deviation 1 within its group first (MixGRPO);
            a single reward stays raw, since advantages do not depend on a positive factor or an offset.
    """
    valid = torch.stack([s.isfinite() for s in scores.values()]).all(0)  # (P, G)
    total = torch.zeros_like(valid, dtype=torch.float64)
    for config in configs:
        raw = clipped(scores[config.key], config).where(valid, torch.nan)
        if how == "standardized" and len(configs) > 1:
            centered = raw - raw.nanmean(1, keepdim=True)
            deviation = centered.square().nanmean(1, keepdim=True).sqrt()
            # Equality is read from the range: rounding leaves equal scores a tiny deviation.
            raw = (centered / deviation).where(reward_spread(raw, valid) > 0, 0.0)
        total += config.weight * raw.nan_to_num()
    return RewardBatch(total.where(valid, 0.0), valid, scores)


def correlations(scores: dict[str, Tensor]) -> Metrics:
    """Pearson correlation within groups, `a~b`, of each pair of rewards; NaN where one of them is constant.

    Near -1, what one reward gains the other loses.

    Args:
        scores: by label, each (P, G), NaN where it failed.
    """
    valid = torch.stack([s.isfinite() for s in scores.values()]).all(0)
    centered = {}
    for label, raw in scores.items():
        kept = raw.where(valid, torch.nan)
        deviations = (kept - kept.nanmean(1, keepdim=True)).where(reward_spread(raw, valid) > 0, 0.0)
        centered[label] = deviations.nan_to_num().flatten()
    return {
        f"{a}~{b}": (torch.dot(centered[a], centered[b]) / (centered[a].norm() * centered[b].norm())).item()
        for a, b in combinations(centered, 2)
    }
