"""Wan text-to-video (Wan-AI/Wan2.1-T2V-1.3B-Diffusers, Wan2.1-T2V-14B, Wan2.2-TI2V-5B, Wan2.2-T2V-A14B).

Source of the conventions: diffusers' `WanPipeline` (pipelines/wan/pipeline_wan.py). The transformer takes
1000 * sigma and gives `noise - clean`. Latents are (C, 1 + (frames - 1) / 4, H / 8, W / 8), of Wan 2.2 H / 16 and
W / 16, standardised channel by channel (`latents_mean`, `latents_std`). UMT5's embeddings are cut at the prompt's end
and padded with zeros to 512 tokens, which are not masked. Without a first picture all timesteps of Wan 2.2's
`expand_timesteps` are equal: one a sample says the same.

Guidance by two passes, 5.0 recommended; of Wan 2.2 A14B, a pair of transformers of which each draws one part of the
steps (`_experts.py`), 4.0 at high noise and 3.0 at low. Sigmas run from 1 linearly to 0 before `flow_shift`, as in
Wan's own code; diffusers' UniPC scheduler starts 1e-6 lower and is up to 0.001 higher before the shift.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import Parts
from ngrpo_lora.models._experts import ExpertsFamily
from ngrpo_lora.types import TextEmbeds


class Family(ExpertsFamily):
    """The Wan text-to-video family; `_base.BaseFamily` documents its members."""

    pipeline_class = "WanPipeline"
    text_encoders = ("text_encoder",)
    kohya_version = "wan"
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward = ("ffn.net.0.proj", "ffn.net.2")
    default_guidance = 5.0
    default_guidances = (4.0, 3.0)

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`, whose number of frames must be one that latents can have."""
        check_frames(config)
        super().configure(config)
        self.settings["num_frames"] = self.num_frames

    def load(self, parts: Parts) -> Any:
        """Load the pipeline; what this family cannot draw is refused before weights are read."""
        check_frames(self.config)
        return super().load(parts)

    @property
    def vae_dtype(self) -> torch.dtype:
        """Number type of the VAE: float32, as in the model cards' examples."""
        return torch.float32

    @property
    def architecture(self) -> str:
        """`modelspec.architecture`: Wan 2.2's models are a single transformer for tokens of their own, and a pair."""
        if self.expert is not None:
            return "wan2.2-t2v-a14b"
        return "wan2.2-ti2v-5b" if self.pipeline.config.expand_timesteps else "wan2.1"

    @property
    def num_frames(self) -> int:
        """Configured number of frames, else those of five seconds at 16 frames a second, 24 for TI2V-5B."""
        return self.config.num_frames or (121 if self.pipeline.config.expand_timesteps else 81)

    @property
    def size_multiple(self) -> int:
        """Side of a transformer's patch in pixels."""
        return self.pipeline.vae_scale_factor_spatial * self.pipeline.transformer.config.patch_size[1]

    def latent_shape_of(self, config: ModelConfig) -> tuple[int, ...]:
        """(C, F, H, W) of the latents, in which the first frame of a video stands alone."""
        frames = (self.num_frames - 1) // self.pipeline.vae_scale_factor_temporal + 1
        cell_px = self.pipeline.vae_scale_factor_spatial
        channels = self.transformer.config.in_channels
        return (channels, frames, config.height_px // cell_px, config.width_px // cell_px)

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """UMT5's tokenizer and its token limit."""
        return {"UMT5": (self.pipeline.tokenizer, int(self.settings["max_sequence_length"]))}

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: UMT5's states, padded with zeros."""
        embeds, _ = self.pipeline.encode_prompt(
            [prompt],
            do_classifier_free_guidance=False,
            max_sequence_length=int(self.settings["max_sequence_length"]),
            device=self.device,
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shape of UMT5's states for a prompt of `tokens` tokens."""
        return {"prompt_embeds": (tokens, self.transformer.config.text_dim)}

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity of the latents, (B, C, F, H, W)."""
        return self.transformer(
            hidden_states=latents,
            timestep=sigmas * 1000,
            encoder_hidden_states=text.tensors["prompt_embeds"].to(self.dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Undo the standardisation of clean latents and decode them; frames of a sample follow one another."""
        pixels = self.vae.decode(self.vae_latents(latents).to(self.vae.dtype), return_dict=False)[0]
        return [frame for video in self.pipeline.video_processor.postprocess_video(pixels, "pil") for frame in video]

    def vae_latents(self, latents: Tensor) -> Tensor:
        """Clean latents without the channel-wise standardisation, as the VAE takes them."""
        config = self.vae.config
        mean, std = (
            latents.new_tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        return latents * std + mean


def check_frames(config: ModelConfig) -> None:
    """Raise UserError for a number of frames that latents cannot have."""
    frames = config.num_frames
    if frames is not None and frames % 4 != 1:
        below = max(1, frames - (frames - 1) % 4)
        raise UserError(
            f"model.num_frames must be 4 k + 1 (1, 5, 9, ...) for Wan, got {frames}; the nearest are {below} and "
            f"{below + 4}"
        )
