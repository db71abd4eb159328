"""Settings of HPSv2.1, for `rewards/hpsv2.py`."""

from __future__ import annotations

from pydantic import Field

from ngrpo_lora.config.plugins import ClipConfig

FILE = "HPS_v2.1_compressed.pt"


class Config(ClipConfig, frozen=True):
    """Settings of HPSv2.1."""

    path: str = Field(default="xswu/HPSv2", description=f"A Hub id or folder that has {FILE}, or such a file.")
    processor: str | None = Field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        description="A Hub id or folder with the tokenizer and the config.json of the CLIP network that was tuned.",
    )
