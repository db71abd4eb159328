"""Qwen-Image: `Qwen/Qwen-Image`, `Qwen/Qwen-Image-2512` and fine-tunes of them.

Source of the conventions: diffusers' `QwenImagePipeline` (pipelines/qwenimage/pipeline_qwenimage.py).

- Time: the transformer takes sigma itself, from 1 (noise) to 0, and gives `noise - clean`.
- Latents: 16 channels, normalised by the VAE's `latents_mean` and `latents_std`; the transformer takes 2 x 2 cells as
  one token. The VAE is a video VAE; an image is its first frame.
- Prompts: Qwen2.5-VL reads them within a template, whose first 34 states are dropped.
- Guidance: two passes at 4.0, after which every token has the norm that it has with the prompt alone. The model card's
  negative prompt is a blank, `model.negative_prompt=" "`.
- Schedule: the shift depends on the size; then the last noise level is stretched to the scheduler's `shift_terminal`.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.equations.solvers import stretch_to_terminal
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.types import TextEmbeds


class Family(BaseFamily):
    """The Qwen-Image family; `_base.BaseFamily` documents its members."""

    pipeline_class = "QwenImagePipeline"
    text_encoders = ("text_encoder",)
    architecture = "Qwen-Image"
    kohya_version = "qwen_image"
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    feed_forward = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    default_guidance = 4.0

    @property
    def not_adapted(self) -> tuple[str, ...]:
        """Text layers of the last block, whose output reaches no image, so that they would get no gradient."""
        last = f"transformer_blocks.{self.transformer.config.num_layers - 1}"
        unused = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        return tuple(f"{last}.{layer}" for layer in unused)

    def latent_shape_of(self, config: ModelConfig) -> tuple[int, ...]:
        """(C, H, W) of the VAE's latents; the transformer takes 2 x 2 of their cells as one token."""
        scale = self.pipeline.vae_scale_factor
        return (self.transformer.config.in_channels // 4, config.height_px // scale, config.width_px // scale)

    def sigmas(self, num_steps: int, shift: float | None = None) -> Tensor:
        """(K + 1,) noise levels, the last before 0 stretched to the scheduler's `shift_terminal` where it has one."""
        sigmas = super().sigmas(num_steps, shift)
        terminal = self.pipeline.scheduler.config.get("shift_terminal")
        return stretch_to_terminal(sigmas, terminal) if terminal else sigmas

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """Qwen2.5-VL's tokenizer and its token limit; of the template only the end counts, and is cut first."""
        return {"Qwen2.5-VL": (self.pipeline.tokenizer, int(self.settings["max_sequence_length"]))}

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: the states of the prompt and of the template's end, and their number."""
        embeds, _ = self.pipeline.encode_prompt(
            [prompt], device=self.device, max_sequence_length=int(self.settings["max_sequence_length"])
        )
        return {"prompt_embeds": embeds, "lengths": torch.tensor([embeds.shape[1]])}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the states and of their number for a prompt of `tokens` tokens."""
        return {"prompt_embeds": (tokens, self.transformer.config.joint_attention_dim), "lengths": ()}

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity of the latents, packed into tokens of 2 x 2 cells, with a mask where prompts differ in length."""
        batch, channels, height, width = latents.shape
        lengths = text.tensors["lengths"]
        longest = int(lengths.max())
        valid = torch.arange(longest) < lengths[:, None]
        packed = self.transformer(
            hidden_states=self.pipeline._pack_latents(latents, batch, channels, height, width),
            timestep=sigmas,
            encoder_hidden_states=text.tensors["prompt_embeds"][:, :longest],
            encoder_hidden_states_mask=None if valid.all() else valid.to(self.device),
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        tokens = packed.view(batch, height // 2, width // 2, channels, 2, 2)
        return tokens.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Classifier-free guidance that keeps each token's norm (all channels of 2 x 2 cells) with the prompt alone."""
        guided = super().guide(conditional, unconditional)
        return (cells(guided) * (token_norms(conditional) / token_norms(guided))).view(guided.shape)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Clean latents (B, C, H, W) -> B images, each the only frame of a video."""
        video = self.vae.decode(self.vae_latents(latents.to(self.vae.dtype)), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(video[:, :, 0], "pil")

    def vae_latents(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, H, W): latents without the normalisation, as one frame of a video."""
        config, frame = self.vae.config, latents[:, :, None]
        mean, std = (frame.new_tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return frame * std + mean


def cells(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H / 2, 2, W / 2, 2), in which one token is dimensions 1, 3 and 5."""
    batch, channels, height, width = latents.shape
    return latents.view(batch, channels, height // 2, 2, width // 2, 2)


def token_norms(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H / 2, 1, W / 2, 1), the Euclidean norm of each token."""
    return torch.linalg.vector_norm(cells(latents), dim=(1, 3, 5), keepdim=True)
