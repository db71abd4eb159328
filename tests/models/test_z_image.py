"""Z-Image and Z-Image-Turbo against diffusers' own pipeline, on a model of two layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from family_checks import (
    PROMPTS,
    check_half_precision,
    check_neighbours,
    check_sampling,
    check_targets,
    check_training,
    check_velocities,
    load,
    model_folder,
    noise_of,
    qwen_tokenizer,
    record,
    stock,
)
from transformers import Qwen3Config, Qwen3Model

from ngrpo_lora.config import load_config
from ngrpo_lora.equations.solvers import flow_sigmas
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily

SIZE: dict[str, Any] = {"height_px": 32, "width_px": 48}
BASE_SHIFT, TURBO_SHIFT = 6.0, 3.0  # the figures of Tongyi-MAI/Z-Image and Z-Image-Turbo

VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.36,
    "shift_factor": 0.12,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer: Any = qwen_tokenizer()
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=None,
        eos_token_id=None,
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=BASE_SHIFT),
        vae=AutoencoderKL(**VAE),
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        ),
    )
    return model_folder(pipeline, tmp_path_factory.mktemp("z_image"))


@pytest.fixture(scope="session")
def turbo_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = stock(folder, "ZImagePipeline")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=TURBO_SHIFT)
    turbo = tmp_path_factory.mktemp("z_image_turbo")
    pipeline.save_pretrained(turbo)
    return turbo


@pytest.fixture(scope="session")
def family(folder: Path) -> BaseFamily:
    return load(folder, **SIZE)


def test_turbo_by_path_in_the_preset_has_one_pass_and_refuses_guidance(turbo_folder: Path, folder: Path):
    """As `ngrpo train z-image model.path=...` and `ngrpo plan` do."""
    for path, passes in ((folder, 2), (turbo_folder, 1)):
        model = load_config("z-image", [f"model.path={path}"]).model
        assert 1 + load(path, **SIZE, guidance_scale=model.guidance_scale).guided == passes
    with pytest.raises(UserError, match=r"guidance_scale must be 0 or null .* Turbo .*, got 5; Z-Image takes"):
        load(turbo_folder, **SIZE, guidance_scale=5.0)
    loaded = load(turbo_folder, **SIZE)
    with pytest.raises(UserError, match="guidance_scale must be 0 or null"):
        loaded.configure(loaded.config.model_copy(update={"guidance_scale": 2.0}))


@pytest.mark.parametrize(
    ("variant", "guidance_scale", "negative_prompt", "expected"),
    [
        ("folder", None, "", 5.0),
        ("folder", 3.0, "blurry", 3.0),
        ("folder", 1.0, "", 1.0),
        ("folder", 0.0, "", 0.0),
        ("turbo_folder", None, "", 0.0),
    ],
)
def test_velocities_and_pictures_are_those_of_diffusers(
    variant: str,
    guidance_scale: float | None,
    negative_prompt: str,
    expected: float,
    request: pytest.FixtureRequest,
):
    folder = request.getfixturevalue(variant)
    family = load(folder, **SIZE, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    assert family.settings["guidance_scale"] == expected
    recording = record(
        stock(folder, "ZImagePipeline"),
        prompt=PROMPTS[2],
        negative_prompt=negative_prompt,
        guidance_scale=expected,
        latents=noise_of(family),
        num_inference_steps=4,
        height=SIZE["height_px"],
        width=SIZE["width_px"],
    )
    check_velocities(family, PROMPTS[2], recording)
    check_sampling(family, PROMPTS[2], recording)


def test_turbo_draws_in_one_pass_and_the_base_model_in_two(family: BaseFamily, turbo_folder: Path):
    turbo = load(turbo_folder, **SIZE)
    assert family.guided
    assert not turbo.guided
    assert torch.equal(turbo.sigmas(8), flow_sigmas(8, TURBO_SHIFT))


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(family: BaseFamily):
    """Prompts of one and of two multiples of the 32 tokens that the transformer pads to."""
    lengths = family.encode(PROMPTS).tensors["lengths"]
    assert set((lengths / 32).ceil().tolist()) == {1, 2}
    check_neighbours(family)


def test_a_prompt_is_cut_with_its_turn_to_the_tokens_asked_for(folder: Path):
    family = load(folder, **SIZE, max_sequence_length=48)
    (tokenizer, limit) = family.tokenizers()["Qwen3"]
    assert family.encode(["a" * limit]).tensors["lengths"].tolist() == [48]
    assert family.encode(["a" * (limit - 1)]).tensors["lengths"].tolist() == [47]
    assert family.encode(["a" * 60]).tensors["prompt_embeds"].shape == (1, 48, 32)
    assert len(tokenizer("a" * 60)["input_ids"]) > limit


def test_half_precision_is_inside_the_model_only(folder: Path):
    check_half_precision(folder, **SIZE)


def test_lora_adapts_the_layers_and_the_refiners(family: BaseFamily):
    blocks = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
    attention = {f"{block}.attention.{layer}" for block in blocks for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    feed_forward = {f"{block}.feed_forward.{layer}" for block in blocks for layer in ("w1", "w2", "w3")}
    check_targets(family, attention, feed_forward)


def test_a_run_trains_the_lora_alone_and_diffusers_loads_it(folder: Path, make_config: MakeConfig, tmp_path: Path):
    settings = [f"model.{key}={value}" for key, value in SIZE.items()]
    check_training(make_config, folder, tmp_path, *settings, "lora.targets=attention+feed_forward")
