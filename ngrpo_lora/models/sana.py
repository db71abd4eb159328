"""Sana 1.6B and Sana 1.5: `Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers`, `SANA1.5_1.6B_1024px_diffusers`
and fine-tunes of them.

Source of the conventions: diffusers' `SanaPipeline` (pipelines/sana/pipeline_sana.py).

- Time: the transformer takes 1000 * sigma, from nearly 1000 (noise) to 0, times its own `timestep_scale`, and gives
  `noise - clean`.
- Latents: 32 channels of AutoencoderDC, each cell 32 x 32 pixels and one token; only scaled.
- Prompts: Gemma-2 reads them, in lower case, after an instruction ("complex human instruction"); 300 states are
  kept, the first and the last 299, with a mask. The negative prompt comes without the instruction.
- Guidance: two passes at 4.5.
- Schedule: that of diffusers' DPM-Solver++ for flows, a constant shift (`flow_shift`, 3) of times from 0.999 to 0.
  With our `dpmpp_2m` it is diffusers' own sampler, except for the times, which diffusers cuts to integers.

The pipeline draws other sizes than those trained on at the nearest of these and resizes the picture; here the
configured size is drawn.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.equations.solvers import shifted
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.types import TextEmbeds


class Family(BaseFamily):
    """The Sana family; `_base.BaseFamily` documents its members."""

    pipeline_class = "SanaPipeline"
    text_encoders = ("text_encoder",)
    architecture = "nvidia-sana-1600"
    kohya_version = "sana"
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward = ("ff.conv_inverted", "ff.conv_point")
    default_guidance = 4.5
    default_tokens = 300
    size_multiple = 32

    def latent_shape_of(self, config: ModelConfig) -> tuple[int, ...]:
        """(C, H, W) of the VAE's latents, one cell for 32 x 32 pixels."""
        scale = self.pipeline.vae_scale_factor
        return (self.transformer.config.in_channels, config.height_px // scale, config.width_px // scale)

    def sigmas(self, num_steps: int, shift: float | None = None) -> Tensor:
        """(K + 1,) noise levels of times from 0.999, the second highest of the 1000 training times, to 0."""
        times = torch.linspace(0.999, 0, num_steps + 1, dtype=torch.float64)
        return shifted(times, shift or self.shift(num_steps)).float()

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """Gemma-2's tokenizer and its tokens for a prompt: of the kept states, one is the instruction's last."""
        return {"Gemma-2": (self.pipeline.tokenizer, int(self.settings["max_sequence_length"]) - 1)}

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: states and mask; a prompt equal to the negative one goes without the instruction."""
        instruction = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=int(self.settings["max_sequence_length"]),
            complex_human_instruction=None if prompt == self.config.negative_prompt else instruction,
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the states and of their mask for a prompt of `tokens` tokens."""
        states = (tokens, self.transformer.config.caption_channels)
        return {"prompt_embeds": states, "prompt_attention_mask": (tokens,)}

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity of the latents, with attention masked to the tokens of each prompt."""
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=text.tensors["prompt_embeds"],
            encoder_attention_mask=text.tensors["prompt_attention_mask"],
            timestep=1000 * sigmas * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
