"""Tiny random models of Wan's classes, saved to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from family_checks import model_folder, t5_tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

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


CLIP: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SEEN: dict[str, Any] = {"image_dim": 16, "added_kv_proj_dim": 24}
"""Settings of a transformer that attends to the states of a picture, of 24 channels."""


def make_folder(folder: Path, second: bool = False, boundary: float | None = None) -> Path:
    """A model like Wan 2.1, with `second` like Wan 2.2 TI2V, or with a `boundary` like Wan 2.2 A14B."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {"text_encoder": text_encoder(), "expand_timesteps": second}
    transformer, another = (WanTransformer3DModel(**TRANSFORMER) for _ in range(2))
    pair = {} if boundary is None else {"transformer_2": another, "boundary_ratio": boundary}
    return model_folder(WanPipeline(**parts, vae=vae(second), transformer=transformer, **pair, **hub()), folder)


def make_first_frame_folder(folder: Path, boundary: float | None = None, **transformer: Any) -> Path:
    """A model like Wan 2.1 I2V, which sees its first frame by CLIP too, or with a `boundary` like Wan 2.2 I2V A14B."""
    torch.manual_seed(0)
    channels: dict[str, Any] = {
        "in_channels": 2 * TRANSFORMER["in_channels"] + 4
    }  # latents, four that say what is given, the frame
    settings: dict[str, Any] = TRANSFORMER | channels | ({} if boundary else SEEN) | transformer
    parts: dict[str, Any] = {"text_encoder": text_encoder(), "vae": vae(), "boundary_ratio": boundary}
    parts["transformer"], another = (WanTransformer3DModel(**settings) for _ in range(2))
    if boundary is None:
        config = CLIPVisionConfig(hidden_size=SEEN["image_dim"], intermediate_size=16, **CLIP)
        side = CLIP["image_size"]
        parts["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)
        parts["image_encoder"] = CLIPVisionModel(config)
    else:
        parts["transformer_2"] = another
    return model_folder(WanImageToVideoPipeline(**parts, **hub()), folder)


def text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def vae(second: bool = False) -> AutoencoderKLWan:
    patches: dict[str, Any] = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.5, 0.1, 0.9, -0.3],
        latents_std=[0.6, 1.5, 2.0, 1.1],
        scale_factor_spatial=16 if second else 8,
        **(patches if second else {}),
    )


def hub() -> dict[str, Any]:
    """Parts of the classes that the models on the Hub have, not of the pipelines' annotations."""
    return {
        "tokenizer": t5_tokenizer(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }
