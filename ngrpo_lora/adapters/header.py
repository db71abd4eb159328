"""The settings in an adapter's header: its model and rollout, so that pictures are drawn as in training."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.config.problems import rule_in_words
from ngrpo_lora.errors import UserError, first_line

NAME = "ngrpo-lora"


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter's own settings: the model that it belongs to, and how it was sampled in training."""

    model: ModelConfig
    rollout: RolloutConfig


def code_version() -> str:
    """The version of this package: as it is installed, or of its clone, which ComfyUI loads without installing it.

    In a folder that was copied alone it is `unknown`.
    """
    try:
        return version(NAME)
    except PackageNotFoundError:
        clone = Path(__file__).resolve().parents[2] / "pyproject.toml"
        project = tomllib.loads(clone.read_text(encoding="utf-8"))["project"] if clone.is_file() else {}
        return project["version"] if project.get("name") == NAME else "unknown"


def read_adapter(path: str | Path) -> AdapterInfo:
    """The settings in an adapter's header, or the defaults where another trainer wrote it and there are none.

    Raises:
        UserError: not a safetensors file, or our metadata in it cannot be understood.
    """
    metadata = read_metadata(path)
    if "ngrpo" not in metadata:
        return AdapterInfo(ModelConfig(), RolloutConfig())
    try:
        own: dict[str, Any] = json.loads(metadata["ngrpo"])
        return AdapterInfo(ModelConfig.model_validate(own["model"]), RolloutConfig.model_validate(own["rollout"]))
    except (ValueError, KeyError, TypeError) as error:
        detail = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, detail['loc']))} {rule_in_words(detail)}".strip() if detail else first_line(error)
        raise UserError(f"adapter {str(path)!r} has ngrpo metadata that this version cannot read: {why}") from error
