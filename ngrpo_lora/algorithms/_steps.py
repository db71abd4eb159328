"""The solver steps that are trained, where the adapter's transformer draws a part of the schedule alone."""

from __future__ import annotations

from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.errors import ConfigError


def before_last(steps: range | None, num_steps: int) -> range:
    """Those of the trained steps (None: of all) that come before the last one, which leads to noise level 0."""
    start, stop = (0, num_steps) if steps is None else (steps.start, steps.stop)
    return range(start, min(stop, num_steps - 1))


def check_steps(key: str, wanted: int | None, steps: range, rollout: RolloutConfig) -> None:
    """Raise ConfigError unless a setting finds as many trained steps as it wants.

    Args:
        key: the setting, in full.
        wanted: how many it wants; None, where it takes all that there are, wants one.
        steps: positions of the solver steps that can be trained.
    """
    if len(steps) < (wanted or 1):
        found = f"{len(steps)} of the {rollout.num_steps} steps" if steps else "none of the steps"
        raise ConfigError(
            f"{key} wants {wanted or 1} or more steps to train, but {found} can be trained, as model.expert draws a "
            f"part of them; {'lower it, or ' if steps else ''}give model.expert more steps by rollout.num_steps or "
            "rollout.shift, or choose the other expert"
        )
