"""What a distilled model says of its steps, and what a run with other steps is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ngrpo_lora.config import ModelConfig, load_config, preset_names
from ngrpo_lora.models._distilled import distilled_note, distilled_steps
from ngrpo_lora.sampling.settings import own_settings


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("lightx2v/Qwen-Image-Lightning/Qwen-Image-Lightning-8steps-V1.1.safetensors", 8),
        ("Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors", 4),
        ("ByteDance/Hyper-SD/Hyper-FLUX.1-dev-16steps-lora.safetensors", 16),
        ("C:\\loras\\wan_4step_distill.safetensors", 4),
        ("alimama-creative/FLUX.1-Turbo-Alpha", 8),
        ("embedded-turbo", 4),
        ("runs/flux/checkpoint-2000steps/adapter", None),  # steps of a training
        ("my-lora-000012.safetensors", None),
        ("runs-4-steps/flux/adapter.safetensors", None),  # a folder of a user's own
        ("first_100_steps_16.safetensors", None),
    ],
)
def test_the_name_of_a_fused_lora_tells_its_steps(name: str, steps: int | None):
    found = distilled_steps(ModelConfig(fuse={name: 1.0}))
    assert found == (None if steps is None else (steps, name))


@pytest.mark.parametrize(
    ("path", "steps"),
    [
        ("black-forest-labs/FLUX.1-schnell", 4),
        ("black-forest-labs/FLUX.1-dev", None),
        ("Tongyi-MAI/Z-Image-Turbo", 8),
        ("Tongyi-MAI/Z-Image", None),
        ("black-forest-labs/FLUX.2-klein-9B", 4),
        ("black-forest-labs/FLUX.2-klein-base-9B", None),
        ("embedded", None),  # without embedded guidance, as schnell
    ],
)
def test_a_model_tells_its_steps_and_is_drawn_in_them(path: str, steps: int | None):
    found = distilled_steps(ModelConfig(path=path))
    assert found == (None if steps is None else (steps, path))
    assert own_settings(path).rollout.num_steps == steps or steps is None


def test_a_folder_tells_its_steps_and_is_drawn_in_them(tmp_path: Path):
    for distilled, steps in ((True, 4), (False, 8)):
        index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        assert own_settings(str(tmp_path)).rollout.num_steps == steps


def test_every_preset_has_the_steps_of_its_model():
    assert {name: distilled_note(load_config(name)) for name in preset_names()} == dict.fromkeys(preset_names())


def test_a_run_with_other_steps_is_told_and_the_advice_is_right():
    told = distilled_note(load_config("flux-schnell", ["rollout.num_steps=6"]))
    assert told is not None
    assert "FLUX.1-schnell is distilled into 4 steps, but rollout.num_steps is 6: " in told
    advice = told.rpartition("give ")[2].split()
    assert distilled_note(load_config("flux-schnell", advice)) is None
