"""FLUX.2 klein (black-forest-labs/FLUX.2-klein-4B and -9B, distilled; FLUX.2-klein-base-4B and -base-9B).

Source of the conventions: diffusers' `Flux2KleinPipeline` (pipelines/flux2/pipeline_flux2_klein.py). The transformer
takes sigma in [0, 1] and gives `noise - clean`. Latents are the VAE's 2 x 2 cells as channels, (128, H / 16, W / 16),
standardised by the running statistics of its batch norm; one cell is one token. Prompts are padded to the full length
and not masked; their embedding is three hidden layers of Qwen3 side by side.

Guidance: the distilled models (`is_distilled` in model_index.json, 4 steps) are drawn without; the base models (50
steps) by two passes, 4.0 recommended. LoRA stays within the blocks: for the layers that modulate all of them ComfyUI
has no LoRA keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._index import model_index
from ngrpo_lora.types import TextEmbeds


class Family(BaseFamily):
    """The FLUX.2 klein family; `_base.BaseFamily` documents its members."""

    pipeline_class = "Flux2KleinPipeline"
    text_encoders = ("text_encoder",)
    attention = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        "to_qkv_mlp_proj",  # of the single blocks, whose feed-forward layers are fused with it and with `to_out`
    )
    feed_forward = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`, and recompute the positions of text and image tokens."""
        check_guidance(config, self.distilled_guidance)
        super().configure(config)
        tokens = int(self.settings["max_sequence_length"])
        self.text_ids = self.pipeline._prepare_text_ids(torch.empty(1, tokens, 1)).to(self.device)
        if self.draws:
            self.image_ids = self.pipeline._prepare_latent_ids(torch.empty(1, *self.latent_shape)).to(self.device)

    def load(self, parts: Parts) -> Any:
        """Load the pipeline; guidance that a distilled model cannot follow is refused before its weights are read."""
        index = model_index(self.config.path, self.config.revision)
        check_guidance(self.config, index.get("is_distilled", False))
        return super().load(parts)

    @property
    def distilled_guidance(self) -> bool:
        """Whether the model is distilled, and so drawn without guidance."""
        return self.pipeline.config.is_distilled

    @property
    def default_guidance(self) -> float:
        """Guidance scale: 4 for the base models, 1 (none) for the distilled ones."""
        return 1.0 if self.distilled_guidance else 4.0

    @property
    def size(self) -> str:
        """Size of the model by its transformer's width: `4b` or `9b`."""
        return "4b" if self.transformer.config.num_attention_heads <= 24 else "9b"

    @property
    def architecture(self) -> str:
        """The value of `modelspec.architecture` in the header of an export, as musubi-tuner writes it."""
        return f"Flux.2-klein-{self.size}"

    @property
    def kohya_version(self) -> str:
        """The value of `ss_base_model_version` in the header of an export, as musubi-tuner writes it."""
        return f"flux_2_klein_{self.size}"

    def latent_shape_of(self, config: ModelConfig) -> tuple[int, ...]:
        """(C, H, W) of the patchified latents, each cell of which holds 2 x 2 cells of the VAE."""
        cell_px = 2 * self.pipeline.vae_scale_factor
        return (self.transformer.config.in_channels, config.height_px // cell_px, config.width_px // cell_px)

    @property
    def image_tokens(self) -> int:
        """Number of tokens of one sample, one for each cell of the latents."""
        return math.prod(self.latent_shape[1:])

    def mu(self, num_steps: int) -> float:
        """Logarithm of the shift, by Black Forest Labs' fit to resolution and number of steps."""
        return compute_empirical_mu(self.image_tokens, num_steps)

    def lora_targets(self, targets: str) -> tuple[list[str], list[str]]:
        """The usual layers and the single blocks' `to_out`, by full names: in double blocks it is a list of modules."""
        layers, left_out = super().lora_targets(targets)
        blocks = range(len(self.transformer.single_transformer_blocks))
        return [*layers, *(f"single_transformer_blocks.{block}.attn.to_out" for block in blocks)], left_out

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """Qwen3's tokenizer, and the number of tokens that its chat template leaves to a prompt."""
        tokenizer = self.pipeline.tokenizer
        template = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        left = int(self.settings["max_sequence_length"]) - len(tokenizer(template)["input_ids"])
        return {"Qwen3": (tokenizer, left)}

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: Qwen3's states at full length, those of the padding included."""
        embeds, _ = self.pipeline.encode_prompt(
            [prompt], device=self.device, max_sequence_length=int(self.settings["max_sequence_length"])
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shape of Qwen3's states for a prompt of `tokens` tokens."""
        return {"prompt_embeds": (tokens, self.transformer.config.joint_attention_dim)}

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity of the latents, whose cells the transformer takes as a sequence of tokens."""
        tokens = self.transformer(
            hidden_states=self.pipeline._pack_latents(latents),
            timestep=sigmas,
            encoder_hidden_states=text.tensors["prompt_embeds"],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).reshape(latents.shape)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Undo the batch norm and the 2 x 2 patches of clean latents, then decode them to images."""
        norm = self.vae.bn
        std = (norm.running_var.float() + norm.eps).sqrt().view(-1, 1, 1)
        cells = self.pipeline._unpatchify_latents(latents * std + norm.running_mean.float().view(-1, 1, 1))
        pixels = self.vae.decode(cells.to(self.vae.dtype), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(pixels, "pil")

    def vae_latents(self, latents: Tensor) -> Tensor:
        """The latents unchanged, since ComfyUI's VAE undoes batch norm and patches itself."""
        return latents


def check_guidance(config: ModelConfig, distilled: bool) -> None:
    """Raise UserError for guidance that a distilled model cannot follow."""
    if distilled and config.guidance_scale not in (None, 1):
        raise UserError(
            f"model.guidance_scale must be 1 or null for {config.path!r}, which is distilled to draw without "
            f"guidance, got {config.guidance_scale:g}; FLUX.2-klein-base takes guidance"
        )
