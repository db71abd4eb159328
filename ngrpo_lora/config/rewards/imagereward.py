"""Settings of ImageReward, for `rewards/imagereward.py`."""

from __future__ import annotations

from pydantic import Field

from ngrpo_lora.config.plugins import ModelRewardConfig

FILE = "ImageReward.pt"


class Config(ModelRewardConfig, frozen=True):
    """Settings of ImageReward."""

    path: str = Field(default="THUDM/ImageReward", description=f"A Hub id or folder that has {FILE}, or such a file.")
    tokenizer: str = Field(
        default="google-bert/bert-base-uncased", description="BERT's tokenizer: a Hub id or a folder."
    )
