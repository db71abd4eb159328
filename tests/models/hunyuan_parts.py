"""Tiny random models of HunyuanVideo 1.5's classes, saved to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from family_checks import model_folder, qwen_tokenizer
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SMALL: dict[str, Any] = {"height_px": 32, "width_px": 64, "num_frames": 5, "max_sequence_length": 64}
TRANSFORMER: dict[str, Any] = {
    "in_channels": 9,  # latents, as many given ones, and which are given
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 4.0,
    "text_embed_dim": 32,
    "text_embed_2_dim": 16,
    "image_embed_dim": 8,
    "rope_axes_dim": (4, 4, 4),
    "task_type": "t2v",
}
SIDES = ("height", "width")
SYSTEM = 92  # bytes of the system message, with which the template is of the 108 tokens that are dropped


def make_folder(folder: Path, **guider: Any) -> Path:
    """A model like that of 480p, with a guider of these settings."""
    parts = common_parts(guider)
    return model_folder(
        HunyuanVideo15Pipeline(transformer=HunyuanVideo15Transformer3DModel(**TRANSFORMER), **parts), folder
    )


def make_first_frame_folder(folder: Path, **guider: Any) -> Path:
    """A model like that of 480p which starts from a picture, for videos of at most 48 x 48 px or as large."""
    parts = common_parts(guider)
    transformer = HunyuanVideo15Transformer3DModel(**TRANSFORMER | {"task_type": "i2v", "target_size": 48})
    parts |= {"image_encoder": siglip(), "feature_extractor": SiglipImageProcessorPil(size=dict.fromkeys(SIDES, 54))}
    return model_folder(HunyuanVideo15ImageToVideoPipeline(transformer=transformer, **parts), folder)


def common_parts(guider: dict[str, Any]) -> dict[str, Any]:
    """What both kinds have beside the transformer, with a guider of these settings."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {"text_encoder": text_encoder(), "text_encoder_2": byt5(), "vae": vae()}
    parts |= {"tokenizer": tokenizer(), "tokenizer_2": ByT5Tokenizer(), "scheduler": scheduler()}
    return parts | {"guider": ClassifierFreeGuidance(**{"guidance_scale": 6.0} | guider)}


def siglip() -> SiglipVisionModel:
    """SigLIP, with as many patches as the one of the published models: 27 x 27."""
    config = SiglipVisionConfig(
        hidden_size=TRANSFORMER["image_embed_dim"],
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=54,
        patch_size=2,
    )
    return SiglipVisionModel(config)


def tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with bytes for tokens, and a template that cuts the system message to the length that is dropped."""
    found = qwen_tokenizer()
    found.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
        f"{{{{ turn.content[:{SYSTEM}] if turn.role == 'system' else turn.content }}}}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return found


def text_encoder() -> Qwen2_5_VLTextModel:
    """The part of Qwen2.5-VL that reads, of three layers, of which the last two are not used."""
    config = Qwen2_5_VLTextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2_5_VLTextModel(config)


def byt5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def vae() -> AutoencoderKLHunyuanVideo15:
    return AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 16, 16, 16), layers_per_block=1)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=5.0)
