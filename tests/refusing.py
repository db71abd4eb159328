"""The message of a configuration that cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngrpo_lora.config import load_config
from ngrpo_lora.errors import ConfigError


def message(*overrides: str, config: str | Path | None = None) -> str:
    """The text of the ConfigError that the overrides cause."""
    with pytest.raises(ConfigError) as error:
        load_config(config, overrides)
    return str(error.value)
