"""Learning rates and knobs that an earlier comparison has found, so that a new one need not search for them again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ngrpo_lora.bench.paper.methods import ALL
from ngrpo_lora.errors import ConfigError

__all__ = ["KNOBS", "RATE", "Given", "is_entry", "point_of", "read_given"]

Given = Mapping[str, Mapping[str, Any]]
"""The entry of each method in an earlier comparison's `tuning.json`, by the method's name."""

RATE = "optimizer.learning_rate"
KNOBS = {method.name: method.knob for method in ALL}


def read_given(path: Path) -> Given:
    """Read the searches of an earlier comparison from its `results.json` or `tuning.json`.

    Raises:
        ConfigError: there is no such file, an entry is damaged, or none is the search of a method that there is now.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--tuned-by must be a file, got {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--tuned-by must be JSON, but {str(path)!r} cannot be read: {error}") from None
    entries = found.get("tuning") if isinstance(found, dict) else found
    entries = entries if isinstance(entries, list) else []
    if damaged := [entry for entry in entries if not is_entry(entry)]:
        raise ConfigError(
            f"--tuned-by must hold each method's winner and points, but {str(path)!r} has {str(damaged[0])[:40]!r}...; "
            "give a file as a comparison has left it"
        )
    given = {entry["method"]: entry for entry in entries if entry["method"] in KNOBS and entry["searched"]}
    if not given:
        raise ConfigError(
            f"--tuned-by must be the results.json or tuning.json of a comparison that has searched, got {str(path)!r}, "
            f"which has no search of any of {', '.join(KNOBS)}"
        )
    return given


def is_entry(found: Any) -> bool:
    """Whether a value is what the search leaves of a method: its winner, and every point that it tried with its reward.

    Of a method that there is no longer, its name is enough.
    """
    if not isinstance(found, dict) or not isinstance(found.get("method"), str):
        return False
    if found["method"] not in KNOBS:
        return True
    points, knob = found.get("points"), KNOBS[found["method"]]
    if not isinstance(found.get("label"), str) or not isinstance(found.get("searched"), bool):
        return False
    return isinstance(points, list) and all(has_point(one, knob) for one in (found, *points))


def has_point(found: Any, knob: str) -> bool:
    """Whether a mapping has a learning rate and a knob, positive numbers as text; its reward is a number or none."""
    if not isinstance(found, dict):
        return False
    rewards = (found.get(part + key) for key in ("validation_reward", "half_interval") for part in ("", "whole_"))
    known = all(value is None or isinstance(value, int | float) for value in rewards)
    return known and is_positive(found.get(RATE)) and is_positive(found.get(knob))


def is_positive(text: Any) -> bool:
    """Whether a value is text that stands for a finite number above 0."""
    try:
        return isinstance(text, str) and 0 < float(text) < math.inf
    except ValueError:
        return False


def point_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Learning rate and knob of an entry's winner."""
    return entry[RATE], entry[KNOBS[entry["method"]]]
