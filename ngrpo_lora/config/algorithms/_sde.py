"""Settings that the SDE baselines share, for `algorithms/_sde.py`."""

from __future__ import annotations

from pydantic import Field

from ngrpo_lora.config.plugins import AlgorithmConfig, RolloutConfig


class SdeConfig(AlgorithmConfig, frozen=True):
    """Settings of a method whose samples are stochastic trajectories."""

    eta: float = Field(0.7, gt=0, description="Strength of the fresh noise.")
    updates_per_rollout: int = Field(1, ge=1, description="Optimizer updates; each has its share of the samples.")
    clip_range: float = Field(1e-4, gt=0, lt=1, description="Clip of the policy ratio (epsilon).")
    max_advantage: float = Field(5.0, gt=0, description="Advantages are held within plus and minus this.")
    reuse_velocities: bool = Field(
        True,
        description="Take the old velocities of later updates from the rollout, as the published codes do; exact but "
        "for rounding, which rollout.merge_adapter makes coarse with 16-bit weights. false: compute them again.",
    )
    reference_weight: float = Field(0.0, ge=0, description="Weight of the divergence from the base model (beta).")

    def steps_in_words(self, rollout: RolloutConfig) -> str:
        """The steps are stochastic, whatever `rollout.solver` is."""
        return f"{rollout.num_steps} stochastic steps (eta {self.eta:g})"

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError unless there is a sample for every update."""
        check_updates(self.updates_per_rollout, rollout.prompts_per_iteration * rollout.group_size, "samples")


def check_updates(updates: int, parts: int, what: str) -> None:
    """Raise ValueError unless each of an iteration's updates gets at least one of its parts, such as samples."""
    if updates > parts:
        raise ValueError(
            f"algorithm.updates_per_rollout must be at most the {what} of an iteration ({parts}), got {updates}; "
            "lower it or raise rollout.prompts_per_iteration"
        )
