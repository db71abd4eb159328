"""Preservation, how much of a source picture an edit has left as it was: 1 is all of it, 0 is black where it was white.

The score is 1 minus the mean absolute difference of the picture and its source, both RGB in [0, 1], over what was not
to be edited: with a `mask` in the metadata, the pixels where that is darker than half (white is to be edited); without
one, the `kept_share` of all pixels that have changed least: not told where an edit belongs, it allows for one of
any shape that covers the rest. A picture that repeats its source has 1: weigh it against a reward for the edit.

The source is scaled and cut to the picture's size, as the model saw it. Where a mask leaves nothing there is no score.
No network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.rewards._edits import source_of

NEEDS_SOURCE = True
"""Each picture is judged beside its source; without one there is no score."""


class Config(RewardConfig, frozen=True):
    """Settings of preservation."""

    kept_share: float = Field(
        default=0.5, gt=0, le=1, description="Without a mask: the share of the pixels that was not to be edited."
    )


class Reward:
    """Compares each picture with its source where that was to stay."""

    def __init__(self, config: Config, device: str):
        self.config = config

    def __call__(self, images: Sequence[Image.Image], metadata: Sequence[dict[str, Any]]) -> list[float]:
        """B scores in [0, 1], NaN where a mask leaves nothing; UserError where there is no source."""
        return [self.score(image, row) for image, row in zip(images, metadata, strict=True)]

    def score(self, image: Image.Image, metadata: dict[str, Any]) -> float:
        """The score of one picture."""
        source, mask = source_of(self.config.key, metadata), metadata.get("mask")
        changed = np.abs(levels(image, "RGB") - levels(source, "RGB")).mean(2)  # (H, W)
        if isinstance(mask, Image.Image):
            kept = changed[levels(mask, "L") < 0.5]
        else:
            count = max(1, round(self.config.kept_share * changed.size))
            kept = np.partition(changed, count - 1, axis=None)[:count]
        return 1 - float(kept.mean()) if kept.size else math.nan


def levels(image: Image.Image, mode: str) -> np.ndarray:
    """A picture's pixels in a mode, float64 in [0, 1]."""
    return np.asarray(image.convert(mode), np.float64) / 255
