"""Settings of PickScore, for `rewards/pickscore.py`."""

from __future__ import annotations

from pydantic import Field

from ngrpo_lora.config.plugins import ClipConfig


class Config(ClipConfig, frozen=True):
    """Settings of PickScore."""

    path: str = Field(default="yuvalkirstain/PickScore_v1", description="A Hub id or folder with the tuned network.")
    processor: str | None = Field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        description="A Hub id or folder with the tokenizer; null: path.",
    )
