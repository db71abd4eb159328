"""Rewards: callables `(images, prompts, metadata) -> scores`, and their sum over groups.

A reward is a file here that holds `score`, or any function of yours by `package.module:function` or
`file.py:function`. `images` are B RGB PIL images, `prompts` B strings, `metadata` B dictionaries; it returns B
numbers (a list, an array or a tensor), higher is better, NaN where an image could not be scored.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora import registry
from ngrpo_lora.advantages import reward_spread
from ngrpo_lora.errors import UserError
from ngrpo_lora.types import RewardBatch

log = logging.getLogger(__name__)

Reward = Callable[[Sequence[Image.Image], Sequence[str], Sequence[dict[str, Any]]], Any]


def load(name: str) -> Reward:
    """The reward function behind a name."""
    if ":" in name:
        return registry.resolve_function(name)
    return registry.load(sys.modules[__name__], name).score


def call(name: str, reward: Reward, images: list[Image.Image], prompts: list[str]) -> Tensor:
    """Scores (B,) float64; NaN for all where the reward raised, which is logged.

    Raises:
        UserError: it returned something other than B numbers.
    """
    try:
        returned = reward(images, prompts, [{} for _ in prompts])
    except Exception:
        log.exception("reward %s raised; its %d images are masked", name, len(images))
        return torch.full((len(images),), torch.nan, dtype=torch.float64)
    try:
        scores = torch.as_tensor(returned, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        scores = torch.empty(0)
    if scores.shape != (len(images),):
        raise UserError(
            f"reward {name} must return {len(images)} numbers for {len(images)} images, got {returned!r:.200}"
        )
    return scores


def combine(scores: dict[str, Tensor], weights: dict[str, float]) -> RewardBatch:
    """Sum rewards over groups; several are first standardised within their group (as MixGRPO does).

    Args:
        scores: raw scores by reward, each (P, G); what is not finite failed and is masked in its group.
        weights: by the same names.
    """
    valid = torch.stack([s.isfinite() for s in scores.values()]).all(0)  # (P, G)
    if len(scores) == 1:
        ((name, raw),) = scores.items()
        return RewardBatch((weights[name] * raw).where(valid, 0.0), valid, scores)
    total = torch.zeros_like(valid, dtype=torch.float64)
    for name, raw in scores.items():
        kept = raw.where(valid, torch.nan)
        centered = kept - kept.nanmean(1, keepdim=True)
        spread = centered.square().nanmean(1, keepdim=True).sqrt()
        # Equality is read from the range: rounding leaves equal scores a tiny deviation.
        total += weights[name] * (centered / spread).where(reward_spread(raw, valid) > 0, 0.0).nan_to_num()
    return RewardBatch(total, valid, scores)
