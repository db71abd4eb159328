"""Settings of GenEval, for `rewards/geneval.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ngrpo_lora.config.plugins import ModelRewardConfig


class Config(ModelRewardConfig, frozen=True):
    """Settings of GenEval: its rules on Mask2Former's detections."""

    path: str = Field(
        default="facebook/mask2former-swin-small-coco-instance",
        description="A Mask2Former for COCO's 80 classes: a Hub id or a folder.",
    )
    color_model: str = Field(
        default="openai/clip-vit-large-patch14", description="The CLIP network that names colours: a Hub id or folder."
    )
    graded: bool = Field(default=False, description="Score how much of the prompt is met, not only whether all is.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number type of both networks; thresholds are GenEval's for float32."
    )
