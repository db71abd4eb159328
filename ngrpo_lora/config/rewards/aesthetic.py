"""Settings of LAION's aesthetic score, for `rewards/aesthetic.py`."""

from __future__ import annotations

from pydantic import Field

from ngrpo_lora.config.plugins import ClipConfig

FILE = "sac+logos+ava1-l14-linearMSE.pth"


class Config(ClipConfig, frozen=True):
    """Settings of LAION's aesthetic score."""

    path: str = Field(
        default="openai/clip-vit-large-patch14",
        description="A Hub id or folder with the network the head was made for.",
    )
    head: str = Field(
        default="camenduru/improved-aesthetic-predictor",
        description=f"The head: a Hub id or folder that has {FILE}, or a file of v1 or v2.",
    )
