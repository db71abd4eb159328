"""With which settings a model or an adapter is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ngrpo_lora.adapters.header import AdapterInfo
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._index import architectures
from ngrpo_lora.sampling.settings import drawing_settings, leading, on_this_machine, own_settings, with_settings

OTHER = AdapterInfo(
    ModelConfig(device="cpu", path="elsewhere", dtype="bfloat16", height_px=96, width_px=48),
    RolloutConfig(num_steps=3, solver="euler", shift=1.5),
)


def write_header(path: Path, metadata: dict[str, str]) -> Path:
    """A file of which nothing but the header is asked for."""
    save_file({"x": torch.zeros(1)}, path, metadata)
    return path


def test_a_model_is_drawn_as_the_adapter_says_else_as_its_preset(tmp_path: Path):
    own = {"model": OTHER.model.model_dump(), "rollout": OTHER.rollout.model_dump()}
    ours = write_header(tmp_path / "ours.safetensors", {"ngrpo": json.dumps(own)})
    theirs = write_header(tmp_path / "theirs.safetensors", {})
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


def test_several_adapters_are_drawn_as_the_first_of_ours_says(tmp_path: Path):
    ours = write_header(tmp_path / "ours.safetensors", {"ngrpo": "{}"})
    theirs, others = (write_header(tmp_path / f"{name}.safetensors", {}) for name in ("theirs", "others"))
    assert leading([theirs, ours, others]) == ours
    assert leading([theirs, others]) == theirs
    assert leading([]) is None


def test_a_base_and_a_lora_of_another_trainer_are_drawn_at_the_size_of_the_models_preset(tmp_path: Path):
    """A command that names FLUX.1 draws no picture of 64 pixels, which are the embedded model's."""
    own = {"model": OTHER.model.model_dump(), "rollout": OTHER.rollout.model_dump()}
    ours = write_header(tmp_path / "ours.safetensors", {"ngrpo": json.dumps(own)})
    theirs = write_header(tmp_path / "theirs.safetensors", {})
    flux = "black-forest-labs/FLUX.1-dev"
    for adapter in (None, theirs):
        info = drawing_settings(adapter, flux, "cpu")
        assert (info.model.path, info.model.height_px, info.model.device) == (flux, 720, "cpu")
        assert info.rollout == RolloutConfig(num_steps=8)
        assert drawing_settings(adapter, None).model == ModelConfig()
    assert drawing_settings(ours, flux).model.height_px == 96
    assert drawing_settings(ours, None).model.path == "elsewhere"
    with pytest.raises(UserError, match="got 'gone'"):
        drawing_settings(theirs, "gone")


def test_options_change_what_they_name_and_all_that_is_wrong_is_said_at_once():
    changed = with_settings(OTHER, {"steps": 7, "guidance": 2.5, "height": 64, "width": None})
    assert changed.rollout == OTHER.rollout.model_copy(update={"num_steps": 7})
    assert changed.model == OTHER.model.model_copy(update={"guidance_scale": 2.5, "height_px": 64})
    with pytest.raises(ConfigError) as error:
        with_settings(OTHER, {"height": 65, "width": 50})
    assert [problem.split(" ")[0] for problem in error.value.problems] == ["--height", "--width"]


def test_a_device_is_that_of_here_and_the_model_may_be_another():
    here = on_this_machine(OTHER, None, "cpu")
    assert (here.model, here.rollout) == (OTHER.model, OTHER.rollout)
    assert on_this_machine(OTHER, "embedded", "cpu").model.path == "embedded"
