"""Settings of HPSv3, for `rewards/hpsv3.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ngrpo_lora.config.plugins import ModelRewardConfig

FILE = "HPSv3.safetensors"


class Config(ModelRewardConfig, frozen=True):
    """Settings of HPSv3."""

    path: str = Field(default="MizzenAI/HPSv3", description=f"A Hub id or folder that has {FILE}, or such a file.")
    processor: str = Field(
        default="Qwen/Qwen2-VL-7B-Instruct",
        description="config.json and tokenizer of the network that was tuned: a Hub id or a folder.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Number type of the network; the head is always float32."
    )
    batch_size: int | None = Field(default=4, ge=1, description="Most images a call; null: all at once.")
