"""Settings of BranchGRPO (arXiv 2509.06040), for `algorithms/branch.py`; defaults are those of its code for FLUX."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ngrpo_lora.config.algorithms._sde import SdeConfig, check_updates
from ngrpo_lora.config.plugins import RolloutConfig


class Config(SdeConfig, frozen=True):
    """Settings of BranchGRPO; the leaves of a group's tree are its `rollout.group_size` samples."""

    name: Literal["branch"] = "branch"
    eta: float = Field(0.3, gt=0, description="Strength of the fresh noise.")
    split_every: int = Field(3, ge=1, description="Steps from one split in two to the next; the first is at step 0.")
    split_noise: float = Field(
        4.0,
        gt=0,
        description="What the fresh noise at a split is multiplied by; the log-probability is that of plain noise.",
    )
    updates_per_rollout: int = Field(
        18, ge=1, description="Optimizer updates, which share the edges: 12 of the 218 of 16 leaves and 20 steps."
    )
    clip_range: float = Field(1e-3, gt=0, lt=1, description="Clip of the policy ratio (epsilon).")
    pruned_steps: int = Field(0, ge=0, description="So many last steps are not trained (depth pruning).")
    kept_leaves: Literal["all", "half", "extremes"] = Field(
        "all", description="Leaves whose paths are trained: all, the better half, or the best and the worst."
    )

    def splits(self, rollout: RolloutConfig) -> range:
        """The steps at which every node has two children."""
        return range(0, round(math.log2(rollout.group_size)) * self.split_every, self.split_every)

    def num_edges(self, rollout: RolloutConfig) -> int:
        """The trained edges of one tree, at most: of every step as many as there are nodes at its end."""
        leaves = {"all": rollout.group_size, "half": rollout.group_size // 2, "extremes": 2}[self.kept_leaves]
        steps = range(rollout.num_steps - self.pruned_steps)
        return sum(min(leaves, 2 ** sum(split <= step for split in self.splits(rollout))) for step in steps)

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError unless G is a power of 2, all splits come before the last step, and edges remain."""
        fitting = [2**n for n in range(1, 31) if (n - 1) * self.split_every < rollout.num_steps - 1]
        if rollout.group_size not in fitting:
            raise ValueError(
                f"rollout.group_size must be one of {', '.join(map(str, fitting[:6]))} with algorithm=branch, "
                f"rollout.num_steps={rollout.num_steps} and algorithm.split_every={self.split_every}, the leaves of a "
                f"tree that splits in two before its last step, got {rollout.group_size}; take one of these, split "
                "more often or roll out with more steps"
            )
        if self.pruned_steps >= rollout.num_steps:
            raise ValueError(
                f"algorithm.pruned_steps must be less than rollout.num_steps ({rollout.num_steps}), "
                f"got {self.pruned_steps}; lower it"
            )
        check_updates(self.updates_per_rollout, rollout.prompts_per_iteration * self.num_edges(rollout), "edges")
