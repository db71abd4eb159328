"""The base class of all sections of the configuration, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from ngrpo_lora.config.words import as_meant

__all__ = ["Section"]


DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:\d+)?)$"
Bounds = tuple[float, float]


class Section(BaseModel, frozen=True):
    """A part of the configuration: immutable, unknown keys refused, no silent conversions, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        fields = cls.model_fields
        return {key: as_meant(value, fields[key].annotation) if key in fields else value for key, value in data.items()}


def listed(value: Any) -> Any:
    """Put a single name or mapping into a list, so that `name` stands for `[name]`; all else passes unchanged."""
    return [value] if isinstance(value, str | Mapping) else value
