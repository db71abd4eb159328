"""The embedded world's own rewards."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples
from ngrpo_lora.world import manifold, scenes
from ngrpo_lora.world.edits import apply, choose_source, parse_edit


@pytest.mark.parametrize("name", ["world", "world_strict"])
def test_the_worlds_rewards_are_1_for_what_the_caption_says(name: str):
    image = Image.fromarray(scenes.render(scenes.parse("a red star"), np.random.default_rng(0)))
    samples = Samples([image, image], ["a red star", "a photo of a blue circle"], [{}, {}])
    right, wrong = Scorer([RewardConfig(name=name)])(samples)[name].tolist()
    assert right == pytest.approx(1, abs=0.1)
    assert wrong < 0.6


@pytest.mark.parametrize("name", ["world_edit", "world_edit_strict"])
def test_the_worlds_rewards_of_edits_are_1_for_the_source_as_it_is_asked_for(name: str):
    rng = np.random.default_rng(0)
    edit = parse_edit("make the star blue")
    source = choose_source(edit, rng)
    before, after = (Image.fromarray(one.render()) for one in (source, apply(edit, source, rng)))
    metadata = [{"source": before}] * 2
    samples = Samples([after, before], [edit.instruction] * 2, metadata)
    right, wrong = Scorer([RewardConfig(name=name)])(samples)[name].tolist()
    assert right == pytest.approx(1, abs=0.05)
    assert wrong < 0.72


def test_a_picture_off_the_renderers_manifold_scores_less_whatever_its_caption():
    true = scenes.render(scenes.parse("a red star"), np.random.default_rng(0))
    noise = np.random.default_rng(1).normal(0, 10, true.shape)
    noisy = np.clip(true + noise, 0, 255).astype(np.uint8)
    samples = Samples([Image.fromarray(true), Image.fromarray(noisy)], ["a red star", "a cat"], [{}, {}])
    right, wrong = Scorer([RewardConfig(name="world_manifold")])(samples)["world_manifold"].tolist()
    assert right == -manifold.distance(true)
    assert wrong == pytest.approx(-10, abs=1.5)
