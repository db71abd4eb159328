"""Graded score of an edit in the embedded world, in [0, 1]: how nearly a picture is its source, edited as asked.

What was to change has changed, and all else is as it was: `world.edit_verifier` reads both pictures. Needs no model. A
prompt that is no instruction of the world, or a source that does not show what is to be edited, is an error.
"""

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
    """Graded verdict of every image for its prompt and source, in [0, 1]: `Verdict.graded`."""
    return [verdict.graded for verdict in verdicts("world_edit", images, prompts, metadata)]
