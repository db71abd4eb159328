"""Settings of Neighbor GRPO (arXiv 2511.16955), for `algorithms/neighbor.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ngrpo_lora.config.plugins import AlgorithmConfig, RolloutConfig


class Config(AlgorithmConfig, frozen=True):
    """Settings of Neighbor GRPO."""

    name: Literal["neighbor"] = "neighbor"
    perturbation_strength: float = Field(
        0.3, gt=0, le=1, description="Radius of the noise neighbourhood (sigma, Eq. 7)."
    )
    antithetic_pairs: bool = Field(
        False, description="Neighbours come in pairs, base + delta and base - delta: their mean is the base's noise."
    )
    num_anchors: int = Field(4, ge=1, description="B: anchors per group, each one forward-backward pass a step.")
    num_train_steps: int = Field(4, ge=1, description="K: solver steps trained per anchor, drawn at random.")
    train_window: int | None = Field(
        None, ge=1, description="Trained steps are drawn from this many first ones, the noisiest; null: from all."
    )
    updates_per_rollout: int = Field(1, ge=1, description="Optimizer updates that share the B * K transitions.")
    clip_range: float = Field(1e-4, gt=0, lt=1, description="Clip of the policy ratio (epsilon, Eq. 9).")
    temperature: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="Divides squared distances; auto: the candidates' mean squared distance; the paper's is 1."
    )
    distance: Literal["latent", "clean"] = Field(
        "latent", description="What Eq. 8 compares: latents after the step, or predictions of the clean image at it."
    )
    old_anchor: Literal["one_step", "rollout"] = Field(
        "one_step", description="Old anchor: its one-step transition under old weights, or the rollout's own point."
    )
    # Below some thousandths the quasi-norm of a group is beyond float64, and all advantages are 0.
    advantage_p: float = Field(2.0, ge=0.1, le=2, description="Quasi-norm of the advantages (p, Eq. 11); 2: standard.")
    scale_rewards: Literal["group", "batch"] = Field(
        "group",
        description="Divide a group's centred rewards by their own quasi-norm (Eq. 11), or by the standard deviation "
        "of all groups of the iteration.",
    )
    min_reward_spread: float = Field(
        0.0, ge=0, description="A group whose rewards all lie within so many of these deviations is skipped."
    )
    reuse_velocities: bool = Field(
        False,
        description="Take the old velocities of later updates from the rollout, for its memory and one forward pass a "
        "transition less; exact but for rounding, which is coarse with 16-bit weights.",
    )
    reference_weight: float = Field(0.0, ge=0, description="Weight of the squared distance to the base model.")
    reference_distance: Literal["step", "velocity"] = Field(
        "step",
        description="That distance: between latents after the step (or clean predictions), in units of the "
        "temperature; or the mean over dimensions between velocities, which holds early steps as firmly as late ones.",
    )

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError unless B <= G, K <= train_window <= steps, updates <= B * K, and G pairs where it must."""
        if self.antithetic_pairs and rollout.group_size % 2:
            raise ValueError(
                f"rollout.group_size must be even with algorithm.antithetic_pairs, got {rollout.group_size}; "
                f"{rollout.group_size + 1} is the next"
            )
        if self.num_anchors > rollout.group_size:
            raise ValueError(
                f"algorithm.num_anchors must be at most rollout.group_size ({rollout.group_size}), "
                f"got {self.num_anchors}; lower it or draw larger groups"
            )
        if self.num_train_steps > rollout.num_steps:
            raise ValueError(
                f"algorithm.num_train_steps must be at most rollout.num_steps ({rollout.num_steps}), "
                f"got {self.num_train_steps}; lower it or roll out with more steps"
            )
        if self.train_window is not None and not self.num_train_steps <= self.train_window <= rollout.num_steps:
            raise ValueError(
                f"algorithm.train_window must be from algorithm.num_train_steps ({self.num_train_steps}) to "
                f"rollout.num_steps ({rollout.num_steps}), got {self.train_window}; null trains all steps"
            )
        if self.updates_per_rollout > self.num_anchors * self.num_train_steps:
            raise ValueError(
                f"algorithm.updates_per_rollout must be at most num_anchors * num_train_steps "
                f"({self.num_anchors * self.num_train_steps}), got {self.updates_per_rollout}"
            )
