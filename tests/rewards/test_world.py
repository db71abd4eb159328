"""The embedded world's own rewards."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples
from ngrpo_lora.world import scenes


@pytest.mark.parametrize("name", ["world", "world_strict"])
def test_the_worlds_rewards_are_1_for_what_the_caption_says(name: str):
    image = Image.fromarray(scenes.render(scenes.parse("a red star"), np.random.default_rng(0)))
    samples = Samples([image, image], ["a red star", "a photo of a blue circle"], [{}, {}])
    right, wrong = Scorer([RewardConfig(name=name)])(samples)[name].tolist()
    assert right == pytest.approx(1, abs=0.1)
    assert wrong < 0.6
