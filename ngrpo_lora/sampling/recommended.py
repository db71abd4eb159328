"""Settings that suit an adapter: those of its header, else those of its model's family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ngrpo_lora.adapters.header import AdapterInfo, read_adapter
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.config import load_config
from ngrpo_lora.models._index import architectures
from ngrpo_lora.world import MODELS

__all__ = ["Recommendation", "recommend"]

PRESETS = {
    "flux": "flux",
    "flux2_klein": "flux2-klein",
    "hunyuan_video15": "hunyuan-video15",
    "qwen_image": "qwen-image",
    "sana": "sana",
    "sd3": "sd35-medium",
    "wan": "wan",
    "z_image": "z-image",
}
"""Preset of each family, whose settings count for LoRA files of other trainers."""


@dataclass(frozen=True)
class Recommendation:
    """Settings to draw with an adapter, and where they are from."""

    info: AdapterInfo
    base: str
    """A model that the package knows, whose schedule of noise levels counts."""
    source: str
    """Where the settings are from, in words."""


def recommend(path: Path, family: str) -> Recommendation:
    """Recommend settings for a LoRA file of this family, without looking up its base anywhere.

    Raises:
        UserError: the ngrpo metadata in the file cannot be understood.
    """
    preset = load_config(PRESETS[family])
    if "ngrpo" not in read_metadata(path):
        info = AdapterInfo(preset.model, preset.rollout)
        return Recommendation(info, preset.model.path, f"not in the file; those of the preset {PRESETS[family]}")
    info = read_adapter(path)  # its shift is the one that was trained with, so any model of the family will do
    known = info.model.path in MODELS or info.model.path in architectures()
    return Recommendation(info, info.model.path if known else preset.model.path, "as in training")
