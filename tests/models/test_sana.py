"""Sana on a tiny model of the true classes, beside diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from family_checks import (
    PROMPTS,
    GivenSigmas,
    byte_vocabulary,
    check_half_precision,
    check_neighbours,
    check_sampling,
    check_targets,
    check_training,
    check_velocities,
    load,
    model_folder,
    noise_of,
    record,
    stock,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from ngrpo_lora.errors import UserError

SIZE_PX = 32
SIZE = [f"model.height_px={SIZE_PX}", f"model.width_px={SIZE_PX}"]


class UnroundedDPMSolver(DPMSolverMultistepScheduler):
    """The scheduler of Sana's folders, but its times are not cut to integers."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, timesteps: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device, timesteps=timesteps)
        self.timesteps = self.sigmas[:-1] * 1000


def scheduler_config() -> dict[str, Any]:
    """As in the folders of Sana 1.6B and 1.5."""
    return {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "final_sigmas_type": "zero",
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    special = {token: i for i, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))}
    vocabulary = special | {symbol: 5 + i for symbol, i in byte_vocabulary("▁").items()}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    vae: Any = AutoencoderDC.from_config(
        {
            "latent_channels": 4,
            "attention_head_dim": 2,
            "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
            "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
            "encoder_block_out_channels": [8, 8],
            "decoder_block_out_channels": [8, 8],
            "encoder_qkv_multiscales": [[], [5]],
            "decoder_qkv_multiscales": [[], [5]],
            "encoder_layers_per_block": [1, 1],
            "decoder_layers_per_block": [1, 1],
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        }
    )
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(gemma),
        vae=vae,
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=32,
            timestep_scale=0.5,
        ),
        scheduler=DPMSolverMultistepScheduler(**scheduler_config()),
    )
    return model_folder(pipeline, tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="session")
def family(folder: Path) -> Any:
    return load(folder, height_px=SIZE_PX, width_px=SIZE_PX)


@pytest.fixture
def pipeline(folder: Path) -> Any:
    return stock(folder, "SanaPipeline")


def run(pipeline: Any, family: Any, prompt: str, **call: Any) -> Any:
    size = {"height": family.config.height_px, "width": family.config.width_px, "use_resolution_binning": False}
    return record(pipeline, prompt=prompt, latents=noise_of(family), num_inference_steps=4, **size, **call)


def test_velocities_and_pictures_are_the_pipelines(family: Any, pipeline: Any):
    assert family.settings == {"guidance_scale": 4.5, "max_sequence_length": 300}
    pipeline.scheduler = GivenSigmas(family.sigmas(4))
    recording = run(pipeline, family, PROMPTS[2], guidance_scale=4.5)
    check_velocities(family, PROMPTS[2], recording)
    check_sampling(family, PROMPTS[2], recording)


def test_without_guidance_they_are_too(folder: Path, pipeline: Any):
    unguided = load(folder, height_px=32, width_px=64, guidance_scale=1.0, max_sequence_length=20)
    pipeline.scheduler = GivenSigmas(unguided.sigmas(4))
    recording = run(pipeline, unguided, PROMPTS[2], guidance_scale=1.0, max_sequence_length=20)
    check_velocities(unguided, PROMPTS[2], recording)
    check_sampling(unguided, PROMPTS[2], recording)


def test_guidance_leads_away_from_the_negative_prompt(folder: Path, pipeline: Any):
    led = load(folder, height_px=SIZE_PX, width_px=SIZE_PX, negative_prompt="a blue cross")
    pipeline.scheduler = GivenSigmas(led.sigmas(4))
    recording = run(pipeline, led, PROMPTS[0], guidance_scale=4.5, negative_prompt="a blue cross")
    check_velocities(led, PROMPTS[0], recording)


def test_our_dpm_solver_is_that_of_the_folder(family: Any, pipeline: Any):
    pipeline.scheduler = UnroundedDPMSolver.from_config(pipeline.scheduler.config)
    check_sampling(family, PROMPTS[1], run(pipeline, family, PROMPTS[1], guidance_scale=4.5), "dpmpp_2m")


def test_a_picture_is_that_of_its_prompt_alone(family: Any):
    check_neighbours(family)


def test_as_many_tokens_of_a_prompt_count_as_are_named(folder: Path):
    family = load(folder, max_sequence_length=12)
    ((tokenizer, limit),) = family.tokenizers().values()
    fits = "b" * (limit - 1)
    assert len(tokenizer(fits)["input_ids"]) == limit
    assert family.encode_alone(fits)["prompt_attention_mask"].all()
    states, of_more, of_less = (family.encode_alone(text)["prompt_embeds"] for text in (fits, f"{fits}b", fits[1:]))
    assert torch.equal(of_more, states)
    assert not torch.equal(of_less, states)


def test_pictures_are_whole_tokens(folder: Path):
    with pytest.raises(UserError, match="model.width_px must be a multiple of 32 for this model, got 48"):
        load(folder, height_px=32, width_px=48)


def test_half_precision_is_inside_the_model_only(folder: Path):
    check_half_precision(folder, height_px=SIZE_PX, width_px=SIZE_PX)


def test_lora_adapts_the_blocks_and_nothing_else(family: Any):
    blocks = ("transformer_blocks.0", "transformer_blocks.1")
    layers = ("to_q", "to_k", "to_v", "to_out.0")
    attention = {f"{block}.{kind}.{name}" for block in blocks for kind in ("attn1", "attn2") for name in layers}
    check_targets(family, attention, {f"{block}.ff.conv_{name}" for block in blocks for name in ("inverted", "point")})


def test_a_run_trains_what_a_stock_pipeline_loads(make_config: MakeConfig, folder: Path, tmp_path: Path):
    check_training(
        make_config, folder, tmp_path, *SIZE, "rollout.merge_adapter=true", "trainer.gradient_checkpointing=true"
    )
