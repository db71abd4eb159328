"""Settings of a window of stochastic steps that moves along the schedule, for MixGRPO and MixGRPO-Flash."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ngrpo_lora.config.algorithms._sde import SdeConfig
from ngrpo_lora.config.plugins import RolloutConfig


class WindowConfig(SdeConfig, frozen=True):
    """Settings of a method that is stochastic within a window alone."""

    window_size: int = Field(4, ge=1, description="Stochastic steps, which are also the trained ones.")
    window: Literal["progressive", "random", "decayed", "frozen"] = Field(
        "progressive",
        description="Where the window is: moves on step by step and starts again; anywhere in each iteration, alike "
        "for all seeds; moves on ever faster past window_decay_from; stays at the start.",
    )
    window_every: int = Field(25, ge=1, description="Iterations between two moves of a progressive or decayed window.")
    window_decay: float = Field(0.1, ge=0, description="decayed: how fast the time between moves shrinks (k).")
    window_decay_from: int = Field(13, ge=0, description="decayed: the step from which on it shrinks (lambda).")
    updates_per_rollout: int = Field(4, ge=1, description="Optimizer updates; each has its share of the samples.")

    def steps_in_words(self, rollout: RolloutConfig) -> str:
        """A window of the steps is stochastic, whatever `rollout.solver` is."""
        return f"{rollout.num_steps} steps, {self.window_size} of them stochastic (eta {self.eta:g})"

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError unless the window leaves the last step free and updates <= samples."""
        if self.window_size >= rollout.num_steps:
            raise ValueError(
                f"algorithm.window_size must be at most {rollout.num_steps - 1} with rollout.num_steps="
                f"{rollout.num_steps}, as the last step is never stochastic, got {self.window_size}; make it smaller "
                f"or roll out with {self.window_size + 1} steps or more"
            )
        super().check(rollout)
