"""Tiny parts of Qwen-Image's models, of the true classes."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# The figures of Qwen/Qwen-Image.
SCHEDULE = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def text_encoder(vocabulary: int, **tokens: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL of two layers and one that sees; `tokens` are the numbers of its special ones."""
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))


def vae(*temporal: bool, base_dim: int = 8) -> AutoencoderKLQwenImage:
    """The VAE, which makes pictures smaller by half as often as there are flags, which count for videos alone."""
    return AutoencoderKLQwenImage(
        base_dim=base_dim,
        z_dim=4,
        dim_mult=[1] * (len(temporal) + 1),
        num_res_blocks=1,
        temperal_downsample=[*temporal],
        latents_mean=[-0.7, 0.1, 0.5, 1.5],
        latents_std=[2.8, 1.4, 2.3, 0.7],
    )


def transformer(**settings: Any) -> QwenImageTransformer2DModel:
    """The transformer, of two blocks."""
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        **settings,
    )
