"""Groups of plain pictures to vote on."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ngrpo_lora.voting.ballots import Group


def make_group(number: int = 0, count: int = 4, prompt: str = "a plain picture") -> Group:
    """Pictures of random colours, which the number fixes."""
    colors = np.random.default_rng(number).integers(0, 256, (count, 3))
    return Group(prompt, [Image.new("RGB", (16, 16), tuple(map(int, color))) for color in colors])
