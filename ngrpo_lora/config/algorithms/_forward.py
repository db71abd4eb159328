"""Settings that methods of the forward process share (`algorithms/_forward.py`)."""

from __future__ import annotations

from pydantic import Field

from ngrpo_lora.config.plugins import AlgorithmConfig


class ForwardConfig(AlgorithmConfig, frozen=True):
    """Settings of any method that noises clean samples anew."""

    updates_per_rollout: int = Field(1, ge=1, description="Optimizer updates; each has its share of the samples.")
    reference_weight: float = Field(0.0, ge=0, description="Weight of the squared distance to the base's velocity.")
