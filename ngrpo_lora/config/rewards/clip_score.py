"""Settings of the CLIP score, for `rewards/clip_score.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ngrpo_lora.config.plugins import ClipConfig


class Config(ClipConfig, frozen=True):
    """Settings of the CLIP score."""

    path: str = Field(
        default="openai/clip-vit-large-patch14",
        description="A Hub id or folder with any CLIP network, or a file of weights (with processor).",
    )
    resize: Literal["auto", "crop", "squash"] = Field(
        default="auto",
        description="Of wide and tall images: the middle, or all, made square; auto: squash for DFN, else crop.",
    )
