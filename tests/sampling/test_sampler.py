"""How a loaded model is drawn with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ngrpo_lora.adapters.header import AdapterInfo
from ngrpo_lora.adapters.reading import Layer
from ngrpo_lora.adapters.writing import save_tensors, state_dict
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.sampling.sampler import Sampler, sample_images

PROMPT = "a star above a heart"

SMALL = ModelConfig(device="cpu")

OTHER = AdapterInfo(
    ModelConfig(device="cpu", path="elsewhere", dtype="bfloat16", height_px=96, width_px=48),
    RolloutConfig(num_steps=3, solver="euler", shift=1.5),
)


def drawn(sampler: Sampler) -> list[object]:
    return [np.asarray(image).tolist() for image in sampler([PROMPT], [5])]


def write_adapter(path: Path, sampler: Sampler) -> Path:
    layers = {}
    for name, module in sampler.family.transformer.named_modules():
        if name.endswith("to_q") and isinstance(module, nn.Linear):
            layers[name] = Layer(torch.ones(1, module.in_features), torch.full((module.out_features, 1), 0.2))
    save_tensors(path, state_dict(layers), {})
    return path


def test_a_loaded_model_is_drawn_with_at_other_settings():
    sampler = Sampler(AdapterInfo(SMALL, RolloutConfig()))
    before = drawn(sampler)
    other = sampler.with_settings(OTHER)
    assert (other.family.config.path, other.family.dtype) == ("embedded", torch.float32)  # as they were loaded
    expected = Sampler(AdapterInfo(SMALL.model_copy(update={"height_px": 96, "width_px": 48}), OTHER.rollout))
    assert drawn(other) == drawn(expected)
    assert drawn(sampler) == before


def test_adapters_leave_nothing_behind_and_a_changed_file_is_read_again(tmp_path: Path):
    sampler = Sampler(AdapterInfo(SMALL, RolloutConfig(num_steps=2)))
    path = write_adapter(tmp_path / "a.safetensors", sampler)
    before = drawn(sampler)
    sampler.with_settings(OTHER).use([(path, 1.0)])  # shared by all samplers of the model
    with_it = drawn(sampler)
    assert with_it != before
    sampler.remove_adapters()
    assert drawn(sampler) == before
    assert not any("lora" in name for name, _ in sampler.family.transformer.named_parameters())
    path.write_bytes(write_adapter(tmp_path / "b.safetensors", sampler.with_settings(OTHER)).read_bytes())
    sampler.use([(path, 1.0)])
    assert drawn(sampler) == with_it
    sampler.remove_adapters()
    sampler.remove_adapters()


def test_sample_images_draws_what_a_sampler_draws():
    (picture,) = sample_images(None, "embedded", [PROMPT], [5])
    assert [np.asarray(picture).tolist()] == drawn(Sampler(AdapterInfo(SMALL, RolloutConfig())))
