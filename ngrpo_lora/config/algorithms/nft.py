"""Settings of DiffusionNFT (arXiv 2509.16117), for `algorithms/nft.py`; defaults are those of its code for SD3.5."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ngrpo_lora.config.algorithms._forward import ForwardConfig
from ngrpo_lora.config.algorithms._sde import check_updates
from ngrpo_lora.config.plugins import RolloutConfig


class Config(ForwardConfig, frozen=True):
    """Settings of DiffusionNFT."""

    name: Literal["nft"] = "nft"
    mixture: float = Field(
        1.0, gt=0, description="How far the implicit positive and negative policies are apart (beta)."
    )
    num_train_steps: int | None = Field(
        None, ge=1, description="Noise levels trained per sample, drawn at random; null: the schedule's but the last."
    )
    reference_weight: float = Field(1e-4, ge=0, description="Weight of the squared distance to the base's velocity.")
    max_advantage: float = Field(5.0, gt=0, description="The advantage at which a sample counts as wholly good (c).")

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError unless trained levels < steps and updates <= samples."""
        if self.num_train_steps is not None and self.num_train_steps >= rollout.num_steps:
            raise ValueError(
                f"algorithm.num_train_steps must be less than rollout.num_steps ({rollout.num_steps}), as the last "
                f"noise level is not trained, got {self.num_train_steps}; null trains all others"
            )
        check_updates(self.updates_per_rollout, rollout.prompts_per_iteration * rollout.group_size, "samples")
