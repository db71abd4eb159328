"""The FLUX.2 klein family against diffusers' `Flux2KleinPipeline`, on tiny models of both kinds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from family_checks import (
    PROMPTS,
    Recording,
    check_another_size,
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
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily

SIZE: dict[str, Any] = {"height_px": 32, "width_px": 48, "max_sequence_length": 64}
SETTINGS = ["model.height_px=32", "model.width_px=48", "model.max_sequence_length=64"]


def make_folder(folder: Path, distilled: bool) -> Path:
    torch.manual_seed(0)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=28,  # the 9th, 18th and 27th are read
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, batch_norm_eps=0.1
    )
    vae.bn.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
    vae.bn.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipeline = Flux2KleinPipeline(scheduler, vae, encoder, qwen_tokenizer(), transformer, is_distilled=distilled)
    return model_folder(pipeline, folder)


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("flux2_klein"), distilled=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("flux2_klein_base"), distilled=False)


@pytest.fixture(scope="session")
def family(base: Path) -> BaseFamily:
    return load(base, **SIZE)


def run_stock(folder: Path, family: BaseFamily, guidance: float) -> Recording:
    def unpack(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(1, *family.latent_shape)

    return record(
        stock(folder, "Flux2KleinPipeline"),
        unpack,
        prompt=PROMPTS[2],
        latents=noise_of(family),
        num_inference_steps=3,
        guidance_scale=guidance,
        height=32,
        width=48,
        max_sequence_length=64,
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_base_model_draws_as_diffusers_does_with_guidance_and_without(base: Path, guidance: float):
    family = load(base, **SIZE, guidance_scale=guidance)
    recording = run_stock(base, family, guidance)
    check_velocities(family, PROMPTS[2], recording)
    check_sampling(family, PROMPTS[2], recording)


def test_a_distilled_model_draws_as_diffusers_does_in_one_pass(distilled: Path):
    family = load(distilled, **SIZE)
    assert not family.guided
    recording = run_stock(distilled, family, 4.0)  # which diffusers ignores
    check_velocities(family, PROMPTS[2], recording)
    check_sampling(family, PROMPTS[2], recording)


def test_the_recommended_guidance_is_that_of_the_pipeline(family: BaseFamily, distilled: Path):
    assert family.settings == {"guidance_scale": 4.0, "max_sequence_length": 64}
    assert load(distilled, **SIZE).settings["guidance_scale"] == 1


def test_a_distilled_model_refuses_guidance(distilled: Path):
    assert load(distilled, **SIZE, guidance_scale=1.0).settings["guidance_scale"] == 1
    with pytest.raises(
        UserError,
        match=r"guidance_scale must be 1 or null .* got 3.5; set it so \(--guidance 1\)",
    ):
        load(distilled, **SIZE, guidance_scale=3.5)


def test_the_shift_depends_on_size_and_steps_as_black_forest_labs_fitted_it(
    family: BaseFamily, monkeypatch: pytest.MonkeyPatch
):
    """At 200 steps mu is 0.00016927 n + 0.45666666, at 10 steps 8.73809524e-05 n + 1.89833333, linear between."""
    monkeypatch.setattr(family, "latent_shape", (128, 64, 64))
    at_10, at_200 = 8.73809524e-05 * 4096 + 1.89833333, 0.00016927 * 4096 + 0.45666666
    assert math.log(family.shift(10)) == pytest.approx(at_10, rel=1e-9)
    assert math.log(family.shift(200)) == pytest.approx(at_200, rel=1e-9)
    assert math.log(family.shift(4)) == pytest.approx(at_10 + 6 * (at_10 - at_200) / 190, rel=1e-9)
    monkeypatch.setattr(family, "latent_shape", (128, 80, 64))
    assert math.log(family.shift(4)) == pytest.approx(0.00016927 * 5120 + 0.45666666, rel=1e-9)


def test_pictures_do_not_depend_on_their_neighbours(family: BaseFamily):
    check_neighbours(family)


def test_lora_adapts_the_blocks_and_nothing_else(family: BaseFamily):
    projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    attention = {f"transformer_blocks.{block}.attn.{layer}" for block in range(2) for layer in projections}
    fused = ["to_qkv_mlp_proj", "to_out"]
    attention |= {f"single_transformer_blocks.{block}.attn.{layer}" for block in range(3) for layer in fused}
    layers = ["ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"]
    feed_forward = {f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in layers}
    check_targets(family, attention, feed_forward)


def test_it_trains_and_a_stock_pipeline_draws_with_the_adapter(make_config: MakeConfig, base: Path, tmp_path: Path):
    run = check_training(make_config, base, tmp_path, *SETTINGS, "lora.targets=attention+feed_forward")
    assert run.family.guided


def test_a_prompt_has_the_tokens_that_the_chat_form_leaves(family: BaseFamily):
    """One token more, and the end of the form is lost, not yet the prompt's."""
    ((tokenizer, limit),) = family.tokenizers().values()
    forms = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a" * length}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        for length in (limit, limit + 1)
    ]
    assert [len(tokenizer(form)["input_ids"]) for form in forms] == [64, 65]


def test_managers_find_the_base_by_its_size(family: BaseFamily, monkeypatch: pytest.MonkeyPatch):
    assert (family.architecture, family.kohya_version) == ("Flux.2-klein-4b", "flux_2_klein_4b")
    family.transformer.register_to_config(num_attention_heads=32)
    try:
        assert (family.architecture, family.kohya_version) == ("Flux.2-klein-9b", "flux_2_klein_9b")
    finally:
        family.transformer.register_to_config(num_attention_heads=2)


def test_a_loaded_model_can_be_asked_for_another_size(base: Path, distilled: Path):
    other = {
        "height_px": 64,
        "width_px": 32,
        "max_sequence_length": 48,
        "guidance_scale": 2.0,
        "negative_prompt": "red",
    }
    check_another_size(base, SIZE, other)
    with pytest.raises(UserError, match="guidance_scale must be 1 or null"):
        load(distilled, **SIZE).with_settings(load(base, **other).config)
