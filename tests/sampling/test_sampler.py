"""Which device and number type a model gets, and how a loaded one is drawn with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ngrpo_lora.adapters.header import AdapterInfo
from ngrpo_lora.adapters.reading import Layer
from ngrpo_lora.adapters.writing import save_tensors, state_dict
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.devices import resolve_device, resolve_dtype
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._blueprint import architectures
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.sampling.sampler import Sampler, sample_images
from ngrpo_lora.sampling.settings import own_settings


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")],
)
def test_auto_is_bfloat16_where_the_cpu_has_instructions_for_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto", "cpu") == expected
    assert load_family(ModelConfig(dtype="auto", device="cpu")).transformer.dtype == getattr(torch, expected)


def test_auto_is_float32_where_pytorch_cannot_tell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert resolve_dtype("auto", "cpu") == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_named_type_is_taken_at_its_word(dtype: str):
    assert resolve_dtype(dtype, "cpu") == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="needs a GPU that PyTorch can use"):
        resolve_device("cuda:1")


# One loaded model, drawn with in several ways ------------------------------------------------------------------------

PROMPT = "a star above a heart"
SMALL = ModelConfig(device="cpu")
OTHER = AdapterInfo(
    ModelConfig(device="cpu", path="elsewhere", dtype="bfloat16", height_px=96, width_px=48),
    RolloutConfig(num_steps=3, solver="euler", shift=1.5),
)


def drawn(sampler: Sampler) -> list[object]:
    return [np.asarray(image).tolist() for image in sampler([PROMPT], [5])]


def write_adapter(path: Path, sampler: Sampler, metadata: dict[str, str]) -> Path:
    layers = {}
    for name, module in sampler.family.transformer.named_modules():
        if name.endswith("to_q") and isinstance(module, nn.Linear):
            layers[name] = Layer(torch.ones(1, module.in_features), torch.full((module.out_features, 1), 0.2))
    save_tensors(path, state_dict(layers), metadata)
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
    path = write_adapter(tmp_path / "a.safetensors", sampler, {})
    before = drawn(sampler)
    sampler.with_settings(OTHER).use([(path, 1.0)])  # shared by all samplers of the model
    with_it = drawn(sampler)
    assert with_it != before
    sampler.remove_adapters()
    assert drawn(sampler) == before
    assert not any("lora" in name for name, _ in sampler.family.transformer.named_parameters())
    path.write_bytes(write_adapter(tmp_path / "b.safetensors", sampler.with_settings(OTHER), {}).read_bytes())
    sampler.use([(path, 1.0)])
    assert drawn(sampler) == with_it
    sampler.remove_adapters()
    sampler.remove_adapters()


def test_a_model_is_drawn_as_the_adapter_says_else_as_its_preset(tmp_path: Path):
    own = {"model": OTHER.model.model_dump(), "rollout": OTHER.rollout.model_dump()}
    sampler = Sampler(AdapterInfo(SMALL, RolloutConfig(num_steps=2)))
    ours = write_adapter(tmp_path / "ours.safetensors", sampler, {"ngrpo": json.dumps(own)})
    theirs = write_adapter(tmp_path / "theirs.safetensors", sampler, {})
    info = own_settings("embedded", ours)
    assert (info.model.height_px, info.model.path, info.rollout) == (96, "embedded", OTHER.rollout)
    assert own_settings("embedded", theirs) == own_settings("embedded") == AdapterInfo(ModelConfig(), RolloutConfig())
    flux = "black-forest-labs/FLUX.1-dev"
    assert own_settings(flux, theirs) == own_settings(flux)
    assert (own_settings(flux).model.height_px, own_settings(flux).model.guidance_scale) == (720, None)
    sibling = own_settings("Wan-AI/Wan2.1-T2V-14B-Diffusers")  # without a preset
    assert (sibling.model.height_px, sibling.model.width_px, sibling.model.num_frames) == (480, 832, 33)
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}))
    assert (own_settings(str(folder)).model.height_px, own_settings(str(folder)).model.negative_prompt) == (1024, " ")
    assert all(own_settings(path).model.height_px >= 480 for path in architectures())


def test_sample_images_draws_what_a_sampler_draws():
    (picture,) = sample_images(None, "embedded", [PROMPT], [5])
    assert [np.asarray(picture).tolist()] == drawn(Sampler(AdapterInfo(SMALL, RolloutConfig())))
