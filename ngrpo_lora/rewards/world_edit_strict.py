"""Strict verdict of an edit in the embedded world: 1 for the source edited as asked and nothing else, else 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ngrpo_lora.rewards._edits import verdicts
from ngrpo_lora.world.edits import parse_edit

NEEDS_SOURCE = True
"""Each picture is judged beside its source; without one there is no score."""

reads = parse_edit
"""What reads a prompt: it raises ValueError for one that is no instruction of the world."""

SQUARE = True
"""Pictures must be as high as wide."""


def score(images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    """Strict verdict of every image for its prompt and source, 0 or 1: `Verdict.strict`."""
    return [float(verdict.strict) for verdict in verdicts("world_edit_strict", images, prompts, metadata)]
