"""FLUX.1 (dev, schnell, Krea) and the embedded model: the same classes at other sizes.

Source of the conventions: diffusers' `FluxPipeline`. FLUX.1-dev's guidance is distilled, so one pass is a guided one;
the embedded model is drawn without.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.types import TextEmbeds

EMBEDDED = Path(__file__).parents[1] / "world" / "model"

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"]


class Family:
    """See `_base.Family` for the contract."""

    architecture = "flux-1-dev"
    kohya_version = "flux1"

    def __init__(self, config: ModelConfig, device: str):
        path = EMBEDDED if config.path == "embedded" else config.path
        dtype = getattr(torch, config.dtype)
        self.pipeline: Any  # diffusers' own annotations do not fit what it returns
        try:
            self.pipeline = FluxPipeline.from_pretrained(path, revision=config.revision, dtype=dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:  # what diffusers raises for bad folders
            raise UserError(f"model.path {config.path!r} could not be loaded as a FluxPipeline: {error}") from error
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.transformer = self.pipeline.transformer.requires_grad_(False).eval()
        self.vae = self.pipeline.vae.requires_grad_(False)
        self.device, self.dtype = torch.device(device), dtype
        scale = 2 * self.pipeline.vae_scale_factor
        for side, size_px in (("height_px", config.height_px), ("width_px", config.width_px)):
            if size_px % scale:
                raise UserError(f"model.{side} must be a multiple of {scale} for this model, got {size_px}")
        height, width = config.height_px // scale, config.width_px // scale  # in tokens of 2 x 2 latents
        self.latent_shape = (self.transformer.config.in_channels // 4, 2 * height, 2 * width)
        self.image_ids = self.pipeline._prepare_latent_image_ids(1, height, width, self.device, dtype)
        guidance = 3.5 if config.guidance_scale is None else config.guidance_scale
        max_tokens = min(512, self.pipeline.tokenizer_2.model_max_length)
        self.settings: dict[str, float | int] = {
            "guidance_scale": guidance,
            "shift": self.shift(height * width),
            "max_sequence_length": config.max_sequence_length or max_tokens,
        }
        self.size_px = (config.height_px, config.width_px)

    def shift(self, num_tokens: int) -> float:
        """The scheduler's shift at this image size: `exp(mu)` with mu linear in the tokens, or a constant."""
        scheduler = self.pipeline.scheduler.config
        if not scheduler.get("use_dynamic_shifting", False):
            return scheduler.get("shift", 1.0)
        slope = (scheduler.max_shift - scheduler.base_shift) / (
            scheduler.max_image_seq_len - scheduler.base_image_seq_len
        )
        return math.exp(scheduler.base_shift + slope * (num_tokens - scheduler.base_image_seq_len))

    def lora_targets(self, targets: str) -> tuple[list[str], list[str]]:
        """Block layers only; `proj_out` is also the name of the model's last layer, which stays as it is."""
        return (ATTENTION + FEED_FORWARD, ["proj_out"]) if targets == "attention+feed_forward" else (ATTENTION, [])

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """CLIP's, of whose 77 tokens one state is left, and T5's."""
        clip, t5 = self.pipeline.tokenizer, self.pipeline.tokenizer_2
        return {"CLIP": (clip, clip.model_max_length), "T5": (t5, int(self.settings["max_sequence_length"]))}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbeds:
        """T5 states and CLIP's pooled state."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=int(self.settings["max_sequence_length"])
        )
        return TextEmbeds({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def velocity(self, latents: Tensor, sigma: Tensor | float, text: TextEmbeds) -> Tensor:
        """The transformer on packed latents; sigma reaches it unrounded, as a float."""
        batch, channels, height, width = latents.shape
        embeds = text.tensors["prompt_embeds"]
        sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).expand(batch)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((batch,), float(self.settings["guidance_scale"]), device=self.device)
        packed = self.transformer(
            hidden_states=self.pipeline._pack_latents(latents.to(self.dtype), batch, channels, height, width),
            timestep=sigmas,
            guidance=guidance,
            pooled_projections=text.tensors["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        tokens = packed.float().view(batch, height // 2, width // 2, channels, 2, 2)
        return tokens.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """The VAE, and diffusers' own conversion to 8 bits."""
        config = self.vae.config
        scaled = latents.to(self.dtype) / config.scaling_factor + config.shift_factor
        return self.pipeline.image_processor.postprocess(self.vae.decode(scaled, return_dict=False)[0], "pil")

    def load_adapter(self, path: str, strength: float) -> None:
        """`FluxPipeline.load_lora_weights` and `set_adapters`.

        Raises:
            UserError: the file holds no LoRA, or one of another model.
        """
        try:
            self.pipeline.load_lora_weights(path, adapter_name="default")
            self.pipeline.set_adapters("default", strength)
        except (ValueError, KeyError, RuntimeError) as error:  # what diffusers and PEFT raise for files that do not fit
            raise UserError(
                f"adapter {path!r} is no LoRA of this model: {error}; give the model it was trained on"
            ) from error
