"""Six small pictures, from black to red, and what a reward of redness says of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from ngrpo_lora.types import Samples

IMAGES = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 50, 100, 150, 200, 250)]

SAMPLES = Samples(IMAGES, ["a", "a", "a", "b", "b", "b"], [{"n": n} for n in range(6)], group_size=3)

NAN = math.nan


def red(image: Image.Image) -> float:
    return float(np.asarray(image)[0, 0, 0])


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_scores(scores: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(scores, tensor(*expected), equal_nan=True, rtol=0, atol=0)
