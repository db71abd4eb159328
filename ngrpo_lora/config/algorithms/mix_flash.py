"""Settings of MixGRPO-Flash (arXiv 2507.21802), for `algorithms/mix_flash.py`.

Flash* is `window: frozen` with `rest_ratio: 0.2`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ngrpo_lora.config.algorithms._window import WindowConfig


class Config(WindowConfig, frozen=True):
    """Settings of MixGRPO-Flash."""

    name: Literal["mix_flash"] = "mix_flash"
    window_every: int = Field(20, ge=1, description="Iterations between two moves of a progressive or decayed window.")
    rest_ratio: float = Field(
        0.4, gt=0, le=1, description="DPM++ steps after the window, as a share of the steps they stand for (r)."
    )
