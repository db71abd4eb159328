"""Settings of MixGRPO (arXiv 2507.21802), for `algorithms/mix.py`; defaults are those of its code for FLUX."""

from __future__ import annotations

from typing import Literal

from ngrpo_lora.config.algorithms._window import WindowConfig


class Config(WindowConfig, frozen=True):
    """Settings of MixGRPO."""

    name: Literal["mix"] = "mix"
