"""Settings of fine-tuning on the best of each group, for `algorithms/best_of_n.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ngrpo_lora.config.algorithms._forward import ForwardConfig
from ngrpo_lora.config.algorithms._sde import check_updates
from ngrpo_lora.config.plugins import RolloutConfig


class Config(ForwardConfig, frozen=True):
    """Settings of best-of-N fine-tuning."""

    name: Literal["best_of_n"] = "best_of_n"
    num_best: int = Field(1, ge=1, description="Samples per group that are trained on, the best ones.")
    num_train_steps: int = Field(4, ge=1, description="Noise levels at which each of them is trained.")
    levels: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="How noise levels are drawn, before the schedule's shift."
    )

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError unless num_best < G and updates <= kept samples."""
        if self.num_best >= rollout.group_size:
            raise ValueError(
                f"algorithm.num_best must be less than rollout.group_size ({rollout.group_size}), got {self.num_best}; "
                "all samples of a group are not its best"
            )
        check_updates(self.updates_per_rollout, rollout.prompts_per_iteration * self.num_best, "best samples")
