"""Learning rates and knobs that an earlier comparison has found, so that a new one need not search for them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ngrpo_lora.bench.paper.methods import METHODS
from ngrpo_lora.errors import ConfigError

__all__ = ["Given", "point_of", "read_given"]

Given = Mapping[str, Mapping[str, Any]]
"""The entry of each method in an earlier comparison's `tuning.json`, by the method's name."""


def read_given(path: Path) -> Given:
    """Read the searches of an earlier comparison from its `results.json` or `tuning.json`.

    Raises:
        ConfigError: there is no such file, or it holds no search of a method that there is now.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--tuned-by must be a file, got {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--tuned-by must be JSON, but {str(path)!r} cannot be read: {error}") from None
    entries = found.get("tuning") if isinstance(found, dict) else found
    knobs = {method.name: method.knob for method in METHODS}
    given = {
        entry["method"]: entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
        and entry.get("searched")
        and isinstance(entry.get("points"), list)
        and {"optimizer.learning_rate", knobs.get(entry.get("method", ""), "")} <= {*entry}
    }
    if not given:
        raise ConfigError(
            f"--tuned-by must be the results.json or tuning.json of a comparison that has searched, got {str(path)!r}, "
            f"which has no search of any of {', '.join(knobs)}"
        )
    return given


def point_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Learning rate and knob of an entry's winner."""
    (knob,) = (key for key in entry if key.startswith("algorithm."))
    return entry["optimizer.learning_rate"], entry[knob]
