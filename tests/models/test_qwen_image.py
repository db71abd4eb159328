"""Qwen-Image against diffusers' own pipeline, on a model of two blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import qwen_parts
import torch
from conftest import MakeConfig
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from family_checks import (
    PROMPTS,
    Recording,
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
from qwen_parts import SCHEDULE

from ngrpo_lora.equations.solvers import flow_sigmas, stretch_to_terminal
from ngrpo_lora.models._base import BaseFamily

SIZE: dict[str, Any] = {"height_px": 32, "width_px": 48}
STEPS = 4


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        vae=qwen_parts.vae(False, True),
        text_encoder=qwen_parts.text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=qwen_parts.transformer(),
    )
    return model_folder(pipeline, tmp_path_factory.mktemp("qwen_image"))


@pytest.fixture(scope="session")
def family(folder: Path) -> BaseFamily:
    return load(folder, **SIZE)


def run_stock(folder: Path, family: BaseFamily, guidance_scale: float, negative_prompt: str) -> Recording:
    """What diffusers draws of our noise."""
    pipeline = stock(folder, "QwenImagePipeline")
    noise, (height, width) = noise_of(family), SIZE.values()
    return record(
        pipeline,
        lambda packed: pipeline._unpack_latents(packed, height, width, pipeline.vae_scale_factor)[:, :, 0],
        prompt=PROMPTS[2],
        negative_prompt=negative_prompt if guidance_scale > 1 else None,
        true_cfg_scale=guidance_scale,
        latents=pipeline._pack_latents(noise, *noise.shape),
        num_inference_steps=STEPS,
        height=height,
        width=width,
    )


@pytest.mark.parametrize(("guidance_scale", "negative_prompt"), [(None, ""), (2.5, " "), (1.0, "")])
def test_velocities_and_pictures_are_those_of_diffusers(
    guidance_scale: float | None, negative_prompt: str, folder: Path
):
    family = load(folder, **SIZE, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    assert family.settings["guidance_scale"] == (guidance_scale or 4.0)
    recording = run_stock(folder, family, guidance_scale or 4.0, negative_prompt)
    check_velocities(family, PROMPTS[2], recording)
    check_sampling(family, PROMPTS[2], recording)


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(family: BaseFamily):
    check_neighbours(family)


def test_a_prompt_is_cut_to_its_tokens(folder: Path):
    family = load(folder, **SIZE, max_sequence_length=70)
    text = family.encode(PROMPTS)
    alone = [family.encode([prompt]).tensors["prompt_embeds"] for prompt in PROMPTS]
    assert max(embeds.shape[1] for embeds in alone) == 70
    assert text.tensors["lengths"].tolist() == [embeds.shape[1] for embeds in alone]


@pytest.mark.parametrize("num_steps", [2, 5, 50])
def test_the_schedule_is_that_of_the_scheduler_at_full_size(
    num_steps: int, family: BaseFamily, monkeypatch: pytest.MonkeyPatch
):
    """1328 px, the size of the model card: 6889 tokens."""
    monkeypatch.setattr(family, "latent_shape", (16, 166, 166))
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULE)
    mu = 0.5 + (0.9 - 0.5) * (6889 - 256) / (8192 - 256)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist(), mu=mu)
    torch.testing.assert_close(family.sigmas(num_steps), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_a_given_shift_is_stretched_like_the_models_own(family: BaseFamily):
    """An adapter names its shift, and is drawn on the noise levels that it was trained on."""
    assert torch.equal(family.sigmas(5, family.shift(5)), family.sigmas(5))
    assert family.sigmas(5, 3.0)[-2:].tolist() == pytest.approx([0.02, 0.0])


def test_a_single_step_has_nothing_to_stretch():
    assert torch.equal(stretch_to_terminal(flow_sigmas(1, 3.0), 0.02), torch.tensor([1.0, 0.0]))


def test_guidance_keeps_the_norm_of_every_token(family: BaseFamily):
    conditional, unconditional = torch.randn(2, 2, *family.latent_shape)
    guided = family.guide(conditional, unconditional)
    plain = unconditional + 4.0 * (conditional - unconditional)
    for row, column in ((0, 0), (2, 4)):
        token = (..., slice(row, row + 2), slice(column, column + 2))
        norms = [x[token].flatten(1).norm(dim=1) for x in (guided, conditional)]
        torch.testing.assert_close(*norms)
        assert torch.cosine_similarity(guided[token].flatten(1), plain[token].flatten(1)).min() > 1 - 1e-6


def test_half_precision_is_inside_the_model_only(folder: Path):
    check_half_precision(folder, **SIZE)


def test_lora_adapts_the_blocks_but_for_what_the_last_one_makes_of_the_text(family: BaseFamily):
    queries = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    attention = {f"transformer_blocks.{i}.attn.{layer}" for i in range(2) for layer in queries}
    streams = [f"{stream}.net.{layer}" for stream in ("img_mlp", "txt_mlp") for layer in ("0.proj", "2")]
    feed_forward = {f"transformer_blocks.{i}.{layer}" for i in range(2) for layer in streams}
    last = {f"transformer_blocks.1.attn.{layer}" for layer in ("add_q_proj", "to_add_out")}
    check_targets(family, attention - last, {name for name in feed_forward if "1.txt_mlp" not in name})


def test_a_run_trains_the_lora_alone_and_diffusers_loads_it(folder: Path, make_config: MakeConfig, tmp_path: Path):
    settings = [f"model.{key}={value}" for key, value in SIZE.items()]
    check_training(make_config, folder, tmp_path, *settings, "lora.targets=attention+feed_forward")
