"""Every combination of some settings' values, each a checked configuration: `--vary "key=value,value"`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ngrpo_lora.config import RunConfig, load_config, parse_value, show_value
from ngrpo_lora.config.words import YesNo
from ngrpo_lora.errors import ConfigError

__all__ = ["Setting", "all_settings", "read_values"]


@dataclass(frozen=True)
class Setting:
    """One combination: the varied keys with their values, and the configuration that has them."""

    values: dict[str, Any]
    config: RunConfig

    @property
    def label(self) -> str:
        """The varied keys and their values as text; it tells the settings of one bench apart."""
        words = {key: value if isinstance(value, str) else show_value(value) for key, value in self.values.items()}
        return ", ".join(f"{key}={word}" for key, word in words.items()) or "as configured"


def read_values(text: str) -> tuple[str, list[Any]]:
    """Read `key=value,value`: the key and its values, each in YAML.

    Raises:
        ConfigError: it does not look like this, or a value is given twice.
    """
    key, _, values = text.partition("=")
    if re.fullmatch(r"\w+(\.\w+)*", key) is None or not values.strip():
        raise ConfigError(f"--vary must look like key=value,value, got {text!r}; for example rollout.num_steps=4,8")
    found = parse_value(key, f"[{values}]")
    if twice := [value for place, value in enumerate(found) if value in found[:place]]:
        raise ConfigError(f"--vary {key} must have each value once, got {show_value(twice[0])} twice; keep one")
    return key, found


def all_settings(config: str | None, overrides: Sequence[str], vary: Sequence[str]) -> list[Setting]:
    """Combine the values of every `--vary` with each other; those of the last one change first.

    Args:
        config, overrides: as of `load_config`; a key is either overridden or varied.
    Raises:
        ConfigError: what is wrong with a key or a value, one line per problem.
    """
    columns: dict[str, list[Any]] = {}
    for key, values in map(read_values, vary):
        if key in columns:
            raise ConfigError(f"--vary must name each key once, got {key} twice; put all its values into one")
        columns[key] = values
    settings, problems = [], []
    for combination in product(*columns.values()):
        values = dict(zip(columns, combination, strict=True))
        try:
            given = (f"{key}={_as_yaml(value)}" for key, value in values.items())
            checked = load_config(config, [*overrides, *given])
        except ConfigError as error:
            problems += error.problems
        else:
            settings.append(Setting(values, checked))
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return settings


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, YesNo) else json.dumps(value, ensure_ascii=False)
