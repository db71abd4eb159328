"""A model of random weights has the shapes of the real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeConfig

from ngrpo_lora.errors import UserError
from ngrpo_lora.models._blueprint import random_family
from ngrpo_lora.models._loading import load_family


def test_the_random_model_has_the_shapes_of_the_real_one(make_config: MakeConfig, tmp_path: Path):
    config = make_config(tmp_path).model
    real, blank = load_family(config), random_family(config)
    shapes = {name: weight.shape for name, weight in real.transformer.named_parameters()}
    assert {name: weight.shape for name, weight in blank.transformer.named_parameters()} == shapes
    assert blank.latent_shape == real.latent_shape


def test_the_random_model_draws_pictures_of_any_prompt(make_config: MakeConfig, tmp_path: Path):
    family = random_family(make_config(tmp_path, "model.height_px=32").model)
    text = family.encode(["a red star", "two blue stars"])
    assert text.tensors.keys() == family.text_shapes(1).keys()
    latents = torch.randn(2, *family.latent_shape)
    with torch.no_grad():
        assert family.velocity(latents, 0.5, text).shape == latents.shape
    assert [picture.size for picture in family.decode(latents)] == [(64, 32)] * 2
    assert family.tokenizers() == {}
    assert type(family).__module__ == "ngrpo_lora.models.flux"


def test_a_quantisation_that_is_not_available_is_said_before_the_model_is_made(make_config: MakeConfig, tmp_path: Path):
    model = make_config(tmp_path).model.model_copy(update={"quantization": "nf4", "path": "no/model"})
    with pytest.raises(UserError, match="model.quantization=nf4 needs"):
        random_family(model)
