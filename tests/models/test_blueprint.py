"""A model of random weights has the shapes of the real one."""

from __future__ import annotations

from pathlib import Path

from conftest import MakeConfig

from ngrpo_lora.models._blueprint import random_family
from ngrpo_lora.models._loading import load_family


def test_the_random_model_has_the_shapes_of_the_real_one(make_config: MakeConfig, tmp_path: Path):
    config = make_config(tmp_path).model
    real, blank = load_family(config), random_family(config)
    shapes = {name: weight.shape for name, weight in real.transformer.named_parameters()}
    assert {name: weight.shape for name, weight in blank.transformer.named_parameters()} == shapes
    assert blank.latent_shape == real.latent_shape
