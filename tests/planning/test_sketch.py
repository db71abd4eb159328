"""Figures of models on the meta device against the same models with numbers, and against published sizes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from ngrpo_lora.adapters import lora
from ngrpo_lora.config import LoraConfig, ModelConfig
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._blueprint import Blueprint, blank_text, make_family, read_blueprint
from ngrpo_lora.models._index import architectures
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.planning.meter import Meter
from ngrpo_lora.planning.sketch import Sketch, adapted_layers, packed_size, sketch

LORA = LoraConfig(rank=4)
HUNYUAN = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p"
KL = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
VIDEO = {"base_dim": 8, "num_res_blocks": 1}
DC = {
    **{f"{side}_block_out_channels": [8, 8, 16, 16, 32, 32] for side in ("encoder", "decoder")},
    **{f"{side}_layers_per_block": [1, 1, 1, 1, 1, 1] for side in ("encoder", "decoder")},
    "attention_head_dim": 8,
}

# Every family at a few thousandths of its size: (changes to the transformer, to the VAE, to the run).
TINY: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "black-forest-labs/FLUX.1-dev": (
        {"num_layers": 5, "num_single_layers": 7, "attention_head_dim": 32, "num_attention_heads": 2}
        | {"joint_attention_dim": 48, "axes_dims_rope": [8, 12, 12]},
        KL,
        {},
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        {"num_layers": 7, "attention_head_dim": 16, "num_attention_heads": 4, "caption_projection_dim": 64}
        | {"joint_attention_dim": 48, "pooled_projection_dim": 32, "dual_attention_layers": [0, 1, 2, 3]},
        KL,
        {},
    ),
    "Qwen/Qwen-Image": (
        {"num_layers": 5, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 48}
        | {"axes_dims_rope": [8, 12, 12]},
        VIDEO,
        {},
    ),
    "Tongyi-MAI/Z-Image": (
        {"n_layers": 5, "dim": 64, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 48, "axes_dims": [8, 12, 12]},
        KL,
        {},
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": (
        {"num_layers": 4, "num_single_layers": 6, "attention_head_dim": 32, "num_attention_heads": 2}
        | {"joint_attention_dim": 48, "axes_dims_rope": [8, 8, 8, 8]},
        KL,
        {},
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": (
        {"num_layers": 5, "attention_head_dim": 8, "num_attention_heads": 8, "cross_attention_head_dim": 16}
        | {"num_cross_attention_heads": 4, "cross_attention_dim": 64, "caption_channels": 48},
        DC,
        {},
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        {"num_layers": 5, "attention_head_dim": 24, "num_attention_heads": 2, "ffn_dim": 96, "text_dim": 48},
        VIDEO,
        {"num_frames": 5},
    ),
    f"{HUNYUAN}_t2v": (
        {"num_layers": 8, "attention_head_dim": 32, "num_attention_heads": 2, "text_embed_dim": 48}
        | {"num_refiner_layers": 1, "text_embed_2_dim": 32, "image_embed_dim": 16, "rope_axes_dim": [8, 12, 12]},
        {"block_out_channels": [8, 8, 16, 32, 32], "layers_per_block": 1},
        {"num_frames": 5},
    ),
}
TINY[f"{HUNYUAN}_i2v"] = TINY[f"{HUNYUAN}_t2v"]

PUBLISHED = {  # billions of parameters; Stability AI counts the table of positions too
    "black-forest-labs/FLUX.1-dev": 11.90,
    "black-forest-labs/FLUX.2-dev": 32.2,
    "black-forest-labs/FLUX.2-klein-base-4B": 3.88,
    "black-forest-labs/FLUX.2-klein-base-9B": 9.08,
    "stabilityai/stable-diffusion-3.5-medium": 2.47,
    "stabilityai/stable-diffusion-3.5-large": 8.15,
    "Qwen/Qwen-Image": 20.4,
    "Tongyi-MAI/Z-Image": 6.15,
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": 1.60,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1.42,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14.3,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 16.4,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14.3,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 14.3,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 5.0,
    f"{HUNYUAN}_t2v": 8.3,
    f"{HUNYUAN}_i2v": 8.3,
}


def tiny(path: str) -> tuple[Blueprint, ModelConfig]:
    known = architectures()[path]
    transformer, vae, run = TINY[path]
    parts = {
        "transformer": {**known["transformer"], "config": known["transformer"]["config"] | transformer},
        "vae": {**known["vae"], "config": known["vae"]["config"] | vae},
        **{name: known[name] for name in ("scheduler", "guider") if name in known},
    }
    config = ModelConfig(path=path, height_px=64, width_px=96, max_sequence_length=16, **run)
    return Blueprint(known["pipeline"], known.get("settings", {}), parts, "a test"), config


@cache
def both(path: str) -> tuple[Sketch, BaseFamily]:
    """A tiny family without contents and with random ones, each with its adapter."""
    blueprint, config = tiny(path)
    real = make_family(blueprint, config, "cpu")
    lora.inject(real.transformer, LORA, *real.lora_targets(LORA.targets), seed=0)
    for weight in lora.parameters(real.transformer).values():
        weight.grad = torch.zeros_like(weight)
    return Sketch(blueprint, config, LORA), real


FORMS = [(False, False, 3), (True, False, 1), (True, True, 2)]
FLUX, *GUIDED = "black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3.5-medium", "Qwen/Qwen-Image"


@pytest.mark.parametrize(
    ("path", "backward", "checkpointing", "batch"),
    [
        pytest.param(path, *form, marks=() if path == FLUX or (path in GUIDED[:1] and form[1]) else pytest.mark.slow)
        for path in TINY
        for form in FORMS
    ],
)
def test_a_pass_without_numbers_takes_what_a_real_one_takes(path: str, backward: bool, checkpointing: bool, batch: int):
    drawn, real = both(path)
    counted = drawn.velocity(batch, backward, checkpointing)
    if checkpointing:
        real.transformer.enable_gradient_checkpointing()
    else:
        real.transformer.disable_gradient_checkpointing()
    text, real.negative = blank_text(real, batch), blank_text(real, 1)
    latents = torch.randn(batch, *real.latent_shape)
    with Meter() as meter, torch.set_grad_enabled(backward):
        velocity = real.velocity(latents, 0.5, text)
        if backward:
            velocity.sum().backward()
    assert counted.peak == pytest.approx(meter.peak, rel=0.01)
    assert counted.flops == pytest.approx(meter.flops, rel=0.01)


@pytest.mark.parametrize("path", TINY)
def test_decoding_without_numbers_takes_what_it_takes(path: str):
    drawn, real = both(path)
    with Meter() as meter:
        real.decode(torch.randn(2, *real.latent_shape))
    counted = drawn.decode(2, tiling=False)
    assert counted.peak == pytest.approx(meter.peak, rel=0.02)
    assert counted.flops == pytest.approx(meter.flops, rel=0.01)


@pytest.mark.parametrize("path", TINY)
def test_the_adapter_is_counted_to_the_weight(path: str):
    drawn, real = both(path)
    assert sorted(drawn.lora) == sorted(weight.numel() for weight in lora.parameters(real.transformer).values())
    fewer = adapted_layers(make_family(*tiny(path)), "attention")
    assert 0 < len(fewer) < len(drawn.adapted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size_px", [32, 96])
def test_the_embedded_model_is_read_from_its_files(dtype: str, size_px: int):
    config = ModelConfig.model_validate({"dtype": dtype, "height_px": size_px, "width_px": 64, "device": "cpu"})
    family, drawn = load_family(config), sketch(config, LORA)
    tensors = [*family.transformer.parameters(), *family.transformer.buffers()]
    assert drawn.weights == sum(tensor.nbytes for tensor in tensors)
    assert drawn.family.latent_shape == family.latent_shape
    assert drawn.family.settings == family.settings
    encoded, blank = family.encode(["a red star"]).tensors, blank_text(drawn.family, 1).tensors
    assert {k: (v.shape, v.dtype) for k, v in encoded.items()} == {k: (v.shape, v.dtype) for k, v in blank.items()}
    for name in family.text_encoders:
        real = sum(weight.numel() for weight in getattr(family.pipeline, name).parameters())
        assert drawn.blueprint.parameters(name) == real


@pytest.mark.parametrize("path", PUBLISHED)
def test_known_architectures_have_their_published_sizes(path: str):
    blueprint = read_blueprint(ModelConfig(path=path))
    transformer = blueprint.make("transformer")
    tensors = [*transformer.parameters(), *dict(transformer.named_buffers()).values()]
    assert sum(tensor.numel() for tensor in tensors) / 1e9 == pytest.approx(PUBLISHED[path], rel=0.02)


def test_packed_sizes_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(192, 1088)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    nested = state.state2
    nf4 = sum(t.nbytes for t in (packed, state.absmax, state.code, state.offset, nested.absmax, nested.code))
    assert packed_size(192 * 1088, 192, "nf4") == nf4
    int8 = bitsandbytes.nn.Linear8bitLt(1088, 192, bias=False, has_fp16_weights=False).to("cpu").state_dict()
    assert packed_size(192 * 1088, 192, "int8") == int8["weight"].nbytes + int8["SCB"].nbytes


def test_a_quantised_base_keeps_all_but_its_linear_layers():
    blueprint, config = tiny("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    drawn = Sketch(blueprint, config.model_copy(update={"dtype": "bfloat16"}), LORA)
    kept = drawn.family.transformer.condition_embedder.time_embedder
    assert {weight.dtype for weight in kept.parameters()} == {torch.float32}
    linear = sum(weight.numel() for weight in (layer.weight for layer in drawn.linear))
    rows = sum(layer.out_features for layer in drawn.linear)
    assert drawn.quantized("int8") == drawn.weights - linear + 4 * rows
    assert kept.linear_1 not in drawn.linear
