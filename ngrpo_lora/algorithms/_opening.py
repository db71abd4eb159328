"""Makes the algorithm of a configuration, and checks that it keeps to the contract of `_base.py`."""

from __future__ import annotations

import inspect

from ngrpo_lora import registry
from ngrpo_lora.algorithms._base import Algorithm
from ngrpo_lora.config import RunConfig
from ngrpo_lora.errors import ConfigError


def open_algorithm(config: RunConfig, steps: range | None = None) -> Algorithm:
    """Make the algorithm that the configuration names, with its settings.

    Args:
        steps: those of a rollout that can be trained; None: all.
    Raises:
        ConfigError: its module was written for another contract than that of `algorithms/_base.py`, or it cannot train
            these steps alone.
    """
    name = config.algorithm.name
    kind = registry.load(registry.ALGORITHMS, name).Algorithm
    for method in ("rollout", "advantages", "updates", "loss"):
        wanted = [*inspect.signature(getattr(Algorithm, method)).parameters]
        found = [*inspect.signature(getattr(kind, method)).parameters] if hasattr(kind, method) else []
        if found != wanted:
            raise ConfigError(
                f"algorithm.name={name}: Algorithm.{method} must have the parameters {', '.join(wanted)}, as in "
                f"algorithms/_base.py, got {', '.join(found) or 'no such method'}; change the module"
            )
    if steps in (None, range(config.rollout.num_steps)):
        algorithm = kind(config.algorithm, config.rollout)
    elif "steps" in inspect.signature(kind).parameters:
        algorithm = kind(config.algorithm, config.rollout, steps)
    else:
        raise ConfigError(
            f"algorithm.name={name} trains all {config.rollout.num_steps} steps of a rollout, but model.expert draws "
            f"{len(steps)} of them; choose an algorithm that can train a part, such as neighbor"
        )
    if lacking := [key for key in ("needs_reference", "needs_old", "metric_names") if not hasattr(algorithm, key)]:
        raise ConfigError(
            f"algorithm.name={name}: Algorithm must have {', '.join(lacking)}, as in algorithms/_base.py; add them"
        )
    return algorithm
