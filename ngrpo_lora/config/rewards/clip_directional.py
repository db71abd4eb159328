"""Settings of the directional CLIP similarity, for `rewards/clip_directional.py`."""

from __future__ import annotations

from ngrpo_lora.config.rewards.clip_score import Config as ClipScoreConfig


class Config(ClipScoreConfig, frozen=True):
    """Settings of the directional CLIP similarity: those of the CLIP score."""
