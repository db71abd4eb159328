"""A transformer of each family, too small to be of use, in diffusers' own pipeline without its other parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ngrpo_lora import registry
from ngrpo_lora.adapters.reading import Layer

JOINT: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        **JOINT,
    )


def flux2_klein() -> Any:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        **JOINT,
    )


def hunyuan_video15() -> Any:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=2,  # PEFT cannot add a LoRA of the model's own convolution, of 1 x 1 x 1, into its weight
        text_embed_dim=32,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        **JOINT,
    )


def qwen_image() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **JOINT
    )


def sana() -> Any:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=4,
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        **JOINT,
    )


def wan() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def z_image() -> Any:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )


MAKERS: dict[str, Callable[[], Any]] = {
    maker.__name__: maker for maker in (flux, flux2_klein, hunyuan_video15, qwen_image, sana, sd3, wan, z_image)
}


OPTIONAL: dict[str, dict[str, Any]] = {
    "flux": {"guidance_embeds": True},
    "flux2_klein": {"guidance_embeds": True},
    "hunyuan_video15": {"use_meanflow": True},
    "wan": {"image_dim": 16, "added_kv_proj_dim": 24},
    "z_image": {"siglip_feat_dim": 16},
}


def complete(family: str) -> Any:
    """The transformer with every layer that some model of the family has."""
    plain = MAKERS[family]()
    config = {key: value for key, value in plain.config.items() if key != "_use_default_values"}
    return type(plain).from_config(config | OPTIONAL.get(family, {})).eval().requires_grad_(False)


def adaptable(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights that a LoRA can adapt, by their layers' names."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: (*m.weight.shape,) for name, m in transformer.named_modules() if isinstance(m, kinds)}


def make(family: str) -> Any:
    """The transformer, every weight random."""
    torch.manual_seed(0)
    transformer = MAKERS[family]().eval().requires_grad_(False)
    for parameter in transformer.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return transformer


def pipeline_of(family: str, transformer: Any) -> Any:
    """diffusers' pipeline with nothing but the transformer: all that its LoRA loader needs.

    That of HunyuanVideo 1.5 has no loader: its transformer's own stands in for one.
    """
    if family == "hunyuan_video15":
        load = partial(transformer.load_lora_adapter, use_safetensors=True)
        return SimpleNamespace(load_lora_weights=load, unload_lora_weights=transformer.unload_lora)
    kind = getattr(diffusers, registry.load(registry.MODELS, family).Family.pipeline_class)
    parts = dict.fromkeys((*kind._get_signature_keys(kind)[0],))
    return kind(**parts | {"transformer": transformer})


@torch.no_grad()
def output(family: str, transformer: Any) -> Tensor:
    """The transformer's answer to one fixed input."""
    torch.manual_seed(1)
    text, sigma = torch.randn(1, 3, 32), torch.tensor([0.5])
    tokens, latents, pooled = torch.randn(1, 4, 16), torch.randn(1, 4, 4, 4), torch.randn(1, 16)
    ids = torch.cartesian_prod(torch.tensor([0.0]), torch.arange(2.0), torch.arange(2.0))
    inputs: dict[str, Any] = {"return_dict": False}
    if family == "z_image":
        return transformer([latents[0].unsqueeze(1)], sigma, [text[0]], **inputs)[0][0]
    if family == "flux":
        inputs |= {"pooled_projections": pooled, "img_ids": ids, "txt_ids": torch.zeros(3, 3)}
    if family == "flux2_klein":
        inputs |= {"img_ids": torch.cat([ids, ids[:, :1]], 1), "txt_ids": torch.zeros(3, 4), "guidance": None}
    if family == "qwen_image":
        inputs |= {"img_shapes": [[(1, 2, 2)]]}
    if family == "sd3":
        inputs |= {"pooled_projections": pooled}
    if family == "hunyuan_video15":
        inputs |= {"encoder_hidden_states_2": torch.randn(1, 2, 16), "image_embeds": torch.randn(1, 1, 16)}
        inputs |= {"encoder_attention_mask": torch.ones(1, 3), "encoder_attention_mask_2": torch.ones(1, 2)}
    packed = family in ("flux", "flux2_klein", "qwen_image")
    video = latents.unsqueeze(2) if family in ("wan", "hunyuan_video15") else latents
    inputs |= {"hidden_states": tokens if packed else video, "encoder_hidden_states": text, "timestep": sigma}
    return transformer(**inputs)[0]


def random_layers(family: str, transformer: nn.Module, rank: int = 2, targets: str = "all") -> dict[str, Layer]:
    """An adapter of the layers that the trainer adapts, or of attention alone."""
    kind = registry.load(registry.MODELS, family).Family
    suffixes = kind.attention if targets == "attention" else kind.attention + kind.feed_forward
    layers = {}
    for name, module in transformer.named_modules():
        block = any(part.isdigit() for part in name.split(".")[:2])
        single = family == "flux2_klein" and name.startswith("single") and name.endswith("attn.to_out")
        if (name.endswith(suffixes) or single) and block and isinstance(module, nn.Linear | nn.Conv2d):
            shape = module.weight.shape
            up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
            layers[name] = Layer(0.3 * torch.randn(rank, *shape[1:]), 0.3 * up)
    return layers
