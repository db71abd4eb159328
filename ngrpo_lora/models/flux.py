"""FLUX.1 (dev, schnell, Krea, Kontext) and the embedded model: the same classes at other sizes.

Source of the conventions: diffusers' `FluxPipeline` and, of Kontext, `FluxKontextPipeline`. Guidance is distilled into
dev, Krea and Kontext, so one pass is a guided one; schnell and the embedded model are drawn without.

Kontext edits: the tokens of the source, encoded by the VAE, stand behind those of the picture that is drawn, at the
same places but with 1 for the first coordinate of their positions. The velocity is that of the drawn tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.types import TextEmbeds
from ngrpo_lora.world import MODELS


class Family(BaseFamily):
    """The FLUX.1 family, embedded model included; `_base.BaseFamily` documents its members."""

    pipeline_class = "FluxPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")
    architecture = "flux-1-dev"
    kohya_version = "flux1"
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    feed_forward = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
    not_adapted = ("proj_out",)  # every single block has a layer of this name, and the model's last layer is one
    default_guidance = 3.5
    distilled_guidance = True

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`, and recompute the positions of image tokens."""
        super().configure(config)
        if self.draws:
            _, height, width = self.latent_shape
            ids = self.pipeline._prepare_latent_image_ids(1, height // 2, width // 2, self.device, self.dtype)
            self.image_ids = ids

    @property
    def source(self) -> str:
        """The folder of an embedded model in the package, or the configured folder or Hub id."""
        return str(MODELS.get(self.config.path, self.config.path))

    def latent_shape_of(self, config: ModelConfig) -> tuple[int, ...]:
        """(C, H, W) of the VAE's latents; the transformer takes 2 x 2 of their cells as one token."""
        scale = self.pipeline.vae_scale_factor
        return (self.transformer.config.in_channels // 4, config.height_px // scale, config.width_px // scale)

    def max_tokens(self) -> int:
        """Number of T5 tokens: the pipeline's 512, or fewer where the tokenizer's limit is lower."""
        return min(512, self.pipeline.tokenizer_2.model_max_length)

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """CLIP's tokenizer, whose 77 tokens yield a single pooled state, and T5's."""
        clip, t5 = self.pipeline.tokenizer, self.pipeline.tokenizer_2
        return {"CLIP": (clip, clip.model_max_length), "T5": (t5, int(self.settings["max_sequence_length"]))}

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: T5's states and CLIP's pooled state."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            [prompt], None, device=self.device, max_sequence_length=int(self.settings["max_sequence_length"])
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of T5's states and CLIP's pooled state for a prompt of `tokens` tokens."""
        config = self.transformer.config
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity of the latents, which are packed into tokens of 2 x 2 cells for the transformer."""
        batch, channels, height, width = latents.shape
        embeds = text.tensors["prompt_embeds"]
        guidance = None
        if self.transformer.config.guidance_embeds:
            scale = float(self.settings["guidance_scale"])
            guidance = torch.full((batch,), scale, device=self.device, dtype=torch.float32)
        packed = self.transformer(
            hidden_states=self.tokens(self.pipeline._pack_latents(latents, *latents.shape), text),
            timestep=sigmas,
            guidance=guidance,
            pooled_projections=text.tensors["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        tokens = packed[:, : height * width // 4].view(batch, height // 2, width // 2, channels, 2, 2)
        return tokens.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)

    def tokens(self, drawn: Tensor, text: TextEmbeds) -> Tensor:
        """What the transformer takes: the tokens (B, N, C) that are drawn, and those that they stand beside."""
        return drawn


class Kontext(Family):
    """FLUX.1-Kontext, which edits a source picture of the size that it draws."""

    pipeline_class = "FluxKontextPipeline"
    edits = True
    default_guidance = 2.5

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`, and recompute the positions of the drawn tokens and of the source's."""
        super().configure(config)
        if self.draws:
            places = self.image_ids[:, 1:]
            self.image_ids = torch.cat([self.image_ids, torch.cat([torch.ones_like(places[:, :1]), places], 1)])

    def encode_edit(self, prompt: str, source: Image.Image) -> dict[str, Tensor]:
        """Encode one prompt as `encode_alone` does, and the source as tokens of its latents' mode."""
        pixels = self.pipeline.image_processor.preprocess(source).to(self.device, self.vae.dtype)
        latents = self.pipeline._encode_vae_image(pixels, generator=None)
        packed = self.pipeline._pack_latents(latents, *latents.shape)
        return self.encode_alone(prompt) | {"source_tokens": packed.to(self.dtype)}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the prompt's states, and of the tokens of a source."""
        return super().text_shapes(tokens) | {"source_tokens": (self.image_tokens, self.transformer.config.in_channels)}

    def tokens(self, drawn: Tensor, text: TextEmbeds) -> Tensor:
        """The tokens that are drawn, and the source's behind them."""
        return torch.cat([drawn, text.tensors["source_tokens"]], 1)

    def edited_size(self, source: Image.Image) -> tuple[int, int]:
        """(height, width): the one of Kontext's resolutions with the nearest aspect, scaled to the configured area."""
        aspect, multiple = source.width / source.height, self.size_multiple
        _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        scale = math.sqrt(self.config.height_px * self.config.width_px) / 1024
        rows, columns = (max(1, round(side * scale / multiple)) for side in (height, width))
        return rows * multiple, columns * multiple
