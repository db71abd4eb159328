"""Settings of DanceGRPO (arXiv 2505.07818), for `algorithms/dance.py`; defaults are those of its code for FLUX."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ngrpo_lora.config.algorithms._sde import SdeConfig
from ngrpo_lora.config.plugins import RolloutConfig


class Config(SdeConfig, frozen=True):
    """Settings of DanceGRPO."""

    name: Literal["dance"] = "dance"
    eta: float = Field(0.3, gt=0, description="Strength of the fresh noise.")
    train_share: float = Field(
        0.6, gt=0, le=1, description="Share of the steps but the last that is trained, drawn for each sample."
    )
    updates_per_rollout: int = Field(2, ge=1, description="Optimizer updates; each has its share of the samples.")

    def steps_trained(self, rollout: RolloutConfig) -> int:
        """Steps trained per sample: `int((K - 1) * train_share)`."""
        return int((rollout.num_steps - 1) * self.train_share)

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError unless at least one step is trained and updates <= samples."""
        if self.steps_trained(rollout) < 1:
            raise ValueError(
                f"algorithm.train_share must be at least {1 / (rollout.num_steps - 1):.3g} with rollout.num_steps="
                f"{rollout.num_steps}, so that a step before the last is trained, got {self.train_share:g}; raise it "
                "or roll out with more steps"
            )
        super().check(rollout)
