"""Stable Diffusion 3.5 on a tiny model of the true classes, beside diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from family_checks import (
    PROMPTS,
    check_half_precision,
    check_neighbours,
    check_sampling,
    check_targets,
    check_training,
    check_velocities,
    clip_tokenizer,
    load,
    model_folder,
    noise_of,
    record,
    relative_error,
    stock,
    t5_tokenizer,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ngrpo_lora.adapters import lora
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._embeddings import EmbeddingCache
from ngrpo_lora.training.export import check_export, save_adapter

SIZE_PX = 32
SIZE = [f"model.height_px={SIZE_PX}", f"model.width_px={SIZE_PX}"]


def clip_encoder() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=512,
        eos_token_id=513,
    )
    return CLIPTextModelWithProjection(config)


def make_folder(folder: Path, with_t5: bool = True, **transformer: Any) -> Path:
    """3.5 Medium: the first of two blocks has a second attention."""
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    third: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    if with_t5:
        third = {"text_encoder_3": T5EncoderModel(t5), "tokenizer_3": t5_tokenizer()}
    own = {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"} | transformer
    vae: Any = AutoencoderKL.from_config(
        {
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "block_out_channels": [8, 8, 8],
            "norm_num_groups": 4,
            "latent_channels": 4,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            **own,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
        **third,
    )
    return model_folder(pipeline, folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def family(folder: Path) -> Any:
    return load(folder, height_px=SIZE_PX, width_px=SIZE_PX)


@pytest.fixture(scope="session")
def pipeline(folder: Path) -> Any:
    return stock(folder, "StableDiffusion3Pipeline")


def run(pipeline: Any, family: Any, prompt: str, **call: Any) -> Any:
    noise = noise_of(family)
    size = {"height": family.config.height_px, "width": family.config.width_px}
    return record(pipeline, prompt=prompt, latents=noise, num_inference_steps=4, **size, **call)


def test_the_version_is_told_by_the_transformer(family: Any, tmp_path: Path):
    assert (family.architecture, family.kohya_version) == ("stable-diffusion-v3.5-medium", "3-5-medium")
    assert family.settings == {"guidance_scale": 4.5, "max_sequence_length": 256}
    large = load(make_folder(tmp_path / "large", dual_attention_layers=()), height_px=32, width_px=64)
    assert (large.architecture, large.kohya_version) == ("stable-diffusion-v3.5-large", "3-5-large")
    assert large.settings["guidance_scale"] == 3.5
    assert large.latent_shape == (4, 8, 16)
    turbo = load((tmp_path / "large").rename(tmp_path / "sd-large-Turbo"), height_px=32, width_px=64)
    assert (turbo.settings["guidance_scale"], turbo.guided) == (1.0, False)
    third = load(make_folder(tmp_path / "third", dual_attention_layers=(), qk_norm=None))
    assert (third.architecture, third.kohya_version) == ("stable-diffusion-v3-medium", "3-medium")
    assert third.settings["guidance_scale"] == 7.0


def test_a_side_beyond_the_transformers_positions_is_refused_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    largest = load(folder, height_px=128, width_px=16)  # 16 patches of 8 px
    with pytest.raises(UserError, match=r"model.width_px must be at most 128 for .*, got 144; make it smaller"):
        largest.with_settings(largest.config.model_copy(update={"width_px": 144}))
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(UserError, match=r"model.height_px must be at most 128 for .* has positions for no more"):
        load(folder, height_px=144, width_px=64)


def test_velocities_and_pictures_are_the_pipelines(family: Any, pipeline: Any):
    recording = run(pipeline, family, PROMPTS[2], guidance_scale=4.5)
    check_velocities(family, PROMPTS[2], recording)
    check_sampling(family, PROMPTS[2], recording)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_they_are_too(guidance: float, folder: Path, pipeline: Any):
    unguided = load(folder, height_px=32, width_px=64, guidance_scale=guidance, max_sequence_length=7)
    recording = run(pipeline, unguided, PROMPTS[2], guidance_scale=guidance, max_sequence_length=7)
    assert not unguided.guided
    check_velocities(unguided, PROMPTS[2], recording)
    check_sampling(unguided, PROMPTS[2], recording)


def test_guidance_leads_away_from_the_negative_prompt(folder: Path, pipeline: Any):
    led = load(folder, height_px=SIZE_PX, width_px=SIZE_PX, negative_prompt="a blue cross")
    recording = run(pipeline, led, PROMPTS[0], guidance_scale=4.5, negative_prompt="a blue cross")
    check_velocities(led, PROMPTS[0], recording)


def test_a_shift_of_ones_own_gives_the_schedule_of_a_scheduler_with_it(family: Any):
    for shift in (1.0, 5.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(10)
        torch.testing.assert_close(family.sigmas(10, shift), scheduler.sigmas, rtol=1e-6, atol=0)
    assert family.sigmas(1).tolist() == [1, 0]


def test_a_picture_is_that_of_its_prompt_alone(family: Any):
    check_neighbours(family)


def test_a_folder_without_t5_draws_as_the_pipeline_and_encodes_without_a_transformer(tmp_path: Path):
    folder = make_folder(tmp_path / "model", with_t5=False)
    family = load(folder, height_px=SIZE_PX, width_px=SIZE_PX)
    assert family.tokenizers().keys() == {"CLIP"}
    pipeline = stock(folder, "StableDiffusion3Pipeline", text_encoder_3=None, tokenizer_3=None)
    check_velocities(family, PROMPTS[0], run(pipeline, family, PROMPTS[0], guidance_scale=4.5))

    cache = EmbeddingCache(tmp_path / "embeddings", family.config)
    cache.fill(load(folder, parts="text"), PROMPTS)
    cached = cache.encode(PROMPTS, torch.device("cpu")).tensors
    for name, tensor in family.encode(PROMPTS).tensors.items():
        assert torch.equal(cached[name], tensor)


def test_half_precision_is_inside_the_model_only(folder: Path):
    check_half_precision(folder, height_px=SIZE_PX, width_px=SIZE_PX)


def test_lora_adapts_the_blocks_and_nothing_else(family: Any):
    image, text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_k_proj", "add_v_proj")
    attention = {f"transformer_blocks.{i}.attn.{name}" for i in (0, 1) for name in image + text}
    attention |= {f"transformer_blocks.0.attn.{name}" for name in ("add_q_proj", "to_add_out")}
    attention |= {f"transformer_blocks.0.attn2.{name}" for name in image}
    feed_forward = {f"transformer_blocks.{i}.ff.{name}" for i in (0, 1) for name in ("net.0.proj", "net.2")}
    feed_forward |= {f"transformer_blocks.0.ff_context.{name}" for name in ("net.0.proj", "net.2")}
    check_targets(family, attention, feed_forward)


def test_the_layer_left_out_is_without_effect(family: Any):
    """The last block's queries of the prompt."""
    (name,) = family.not_adapted
    bias, text = family.transformer.get_submodule(name).bias, family.encode(PROMPTS[:1])
    kept = bias.clone()
    with torch.no_grad():
        before = family.velocity(noise_of(family), 0.5, text)
        bias.normal_()
        after = family.velocity(noise_of(family), 0.5, text)
        bias.copy_(kept)
    assert relative_error(after, before) < 1e-6


def test_a_run_trains_what_a_stock_pipeline_loads(make_config: MakeConfig, folder: Path, tmp_path: Path):
    check_training(make_config, folder, tmp_path, *SIZE, "model.text_encoders=cache")


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_the_export_check_knows_what_rounding_does_in_a_deep_guided_model(
    factor: float, make_config: MakeConfig, tmp_path: Path
):
    """In 24 layers, with guidance, rounding an adapter to bfloat16 changes the velocity by 3%."""
    path = make_folder(tmp_path / "deep", num_layers=24)
    family = load(path, height_px=SIZE_PX, width_px=SIZE_PX, dtype="bfloat16", guidance_scale=4.5)
    config = make_config(tmp_path, f"model.path={path}", "model.dtype=bfloat16", *SIZE)
    lora.inject(family.transformer, config.lora, *family.lora_targets(config.lora.targets), seed=0)
    draw = torch.Generator().manual_seed(0)
    for name, weight in lora.parameters(family.transformer).items():  # an effect of 11%
        weight.data.copy_((0.01 if "lora_B" in name else 0.3) * torch.randn(weight.shape, generator=draw))
    save_adapter(tmp_path / "adapter.safetensors", family, config)
    for name, weight in lora.parameters(family.transformer).items():
        weight.data *= factor if "lora_B" in name else 1.0
    text = family.encode(PROMPTS[:1])
    if factor == 1.0:
        assert 0 < check_export(tmp_path / "adapter.safetensors", family, text, noise_of(family)) < 1
    else:
        with pytest.raises(UserError, match=r"adapter\.safetensors differs from the trained one by"):
            check_export(tmp_path / "adapter.safetensors", family, text, noise_of(family))
