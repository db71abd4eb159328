"""The sizes that a model draws."""

from __future__ import annotations

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError


def check_size(config: ModelConfig, multiple: int) -> None:
    """Raise UserError for a height or width in pixels that is no multiple of a number."""
    for side, size_px in (("height_px", config.height_px), ("width_px", config.width_px)):
        if size_px % multiple:
            raise UserError(f"model.{side} must be a multiple of {multiple} for this model, got {size_px}")
