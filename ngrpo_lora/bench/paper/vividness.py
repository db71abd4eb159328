"""A reward that is easily hacked: the colour saturation of a picture, whatever its prompt asks for.

It stands for a learned preference model, which prefers vivid pictures: maximised without restraint it rises while the
pictures show less and less of what the prompt says, which the verifier, not trained on, measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def score(images: Sequence[Image.Image]) -> list[float]:
    """Mean saturation of every image's pixels (the S of HSV), in [0, 1]."""
    return [float(np.asarray(image.convert("HSV"))[..., 1].mean()) / 255 for image in images]
