"""Settings of Flow-GRPO (arXiv 2505.05470), for `algorithms/flow_grpo.py`.

Defaults are those of its code for SD3.5, but for the pull to the base model, which is off as in its FLUX recipe.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ngrpo_lora.config.algorithms._sde import SdeConfig
from ngrpo_lora.config.plugins import RolloutConfig


class Config(SdeConfig, frozen=True):
    """Settings of Flow-GRPO."""

    name: Literal["flow_grpo"] = "flow_grpo"
    step: Literal["sde", "cps"] = Field(
        "sde", description="Stochastic step: Flow-GRPO's own, or coefficients-preserving sampling (arXiv 2509.05952)."
    )
    eta: float = Field(
        0.7, gt=0, description="Strength of the fresh noise; 0.9 in its FLUX recipe; 0.8 and at most 1 for cps."
    )
    noise_last_step: bool = Field(
        True,
        description="Add fresh noise in the last step too, as the published code does, which stays in the picture; "
        "false: that step is Euler's.",
    )
    num_train_steps: int | None = Field(
        None, ge=1, description="Solver steps trained per sample, drawn at random; null: all but the last."
    )
    updates_per_rollout: int = Field(2, ge=1, description="Optimizer updates; each has its share of the samples.")
    clip_range: float = Field(
        1e-4, gt=0, lt=1, description="Clip of the policy ratio (epsilon); published are 1e-5 for cps, 2e-6 for guard."
    )
    guard: bool = Field(
        False,
        description="GRPO-Guard (arXiv 2510.22319): ratios without their bias and scaled alike at every step, and "
        "losses divided by the step's length.",
    )
    reference_weight: float = Field(
        0.0, ge=0, description="Weight of the divergence from the base model (beta); 0.04 in the paper, 0 for FLUX."
    )

    def steps_in_words(self, rollout: RolloutConfig) -> str:
        """The steps are stochastic, whatever `rollout.solver` is."""
        return f"{rollout.num_steps} stochastic steps ({self.step}, eta {self.eta:g})"

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError unless eta <= 1 and no guard for cps, trained steps < steps and updates <= samples."""
        if self.step == "cps" and self.eta > 1:
            raise ValueError(f"algorithm.eta must be at most 1 with algorithm.step=cps, got {self.eta:g}")
        if self.step == "cps" and self.guard:
            raise ValueError("algorithm.guard needs algorithm.step=sde, whose log-probabilities it corrects, got cps")
        if self.num_train_steps is not None and self.num_train_steps >= rollout.num_steps:
            raise ValueError(
                f"algorithm.num_train_steps must be less than rollout.num_steps ({rollout.num_steps}), as the last "
                f"step is not trained, got {self.num_train_steps}; null trains all others"
            )
        super().check(rollout)
