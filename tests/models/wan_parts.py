"""Tiny random models of Wan's classes, saved to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from family_checks import model_folder, t5_tokenizer
from transformers import UMT5Config, UMT5EncoderModel

SMALL: dict[str, Any] = {"height_px": 16, "width_px": 32, "num_frames": 5, "max_sequence_length": 64}
LARGE: dict[str, Any] = dict(SMALL, height_px=32, width_px=64)  # as many latents, of cells twice as wide
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def make_folder(folder: Path, second: bool = False, boundary: float | None = None) -> Path:
    """A model like Wan 2.1, with `second` like Wan 2.2 TI2V, or with a `boundary` like Wan 2.2 A14B."""
    torch.manual_seed(0)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    transformer, another = (WanTransformer3DModel(**TRANSFORMER) for _ in range(2))
    patches: dict[str, Any] = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.5, 0.1, 0.9, -0.3],
        latents_std=[0.6, 1.5, 2.0, 1.1],
        scale_factor_spatial=16 if second else 8,
        **(patches if second else {}),
    )
    hub: dict[str, Any] = {  # the classes of the models on the Hub, not of the pipeline's annotations
        "tokenizer": t5_tokenizer(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }
    if boundary is not None:
        hub |= {"transformer_2": another, "boundary_ratio": boundary}
    pipeline = WanPipeline(text_encoder=encoder, vae=vae, transformer=transformer, expand_timesteps=second, **hub)
    return model_folder(pipeline, folder)
