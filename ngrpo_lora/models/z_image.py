"""Z-Image and Z-Image-Turbo: `Tongyi-MAI/Z-Image`, `Tongyi-MAI/Z-Image-Turbo` and fine-tunes of them.

Source of the conventions: diffusers' `ZImagePipeline` (pipelines/z_image/pipeline_z_image.py).

- Time: the transformer takes `1 - sigma`, from 0 (noise) to 1, and gives `clean - noise`.
- Latents: 16 channels of FLUX.1's VAE. The transformer takes lists, one (C, 1, H, W) and one (tokens, features) per
  sample, makes tokens of 2 x 2 cells, and pads by itself.
- Prompts: Qwen3 reads them as a chat turn; its last state but one counts.
- Guidance: two passes, `conditional + scale * (conditional - unconditional)`, so that a scale is one less than
  elsewhere and 0 is none. 5.0 by default (the model card: 3 to 5). Turbo is distilled and drawn at 0, in one pass.
- Schedule: a constant shift, 6 of the base model and 3 of Turbo, by which the two are told apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._index import model_json
from ngrpo_lora.types import TextEmbeds

TURBO_SHIFT = 3.0


class Family(BaseFamily):
    """The Z-Image family; `_base.BaseFamily` documents its members."""

    pipeline_class = "ZImagePipeline"
    text_encoders = ("text_encoder",)
    architecture = "Z-Image"
    kohya_version = "z_image"
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward = ("w1", "w2", "w3")

    @property
    def default_guidance(self) -> float:
        """Guidance scale: 5.0 for the base model, 0 (none) for Turbo."""
        return 0.0 if self.pipeline.scheduler.config.shift == TURBO_SHIFT else 5.0

    @property
    def guided(self) -> bool:
        """Whether guidance takes a second pass: here 0 is the scale without guidance, not 1."""
        return self.settings["guidance_scale"] > 0

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Guidance of velocities as in Imagen's Eq. 2, with a scale of `w - 1`."""
        return conditional + self.settings["guidance_scale"] * (conditional - unconditional)

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`; guidance that Turbo cannot follow is refused.

        Raises:
            UserError: it is, with rule, value and remedy.
        """
        check_guidance(config, self.pipeline.scheduler.config.shift)
        super().configure(config)

    def load(self, parts: Parts) -> Any:
        """Load the pipeline; guidance that Turbo cannot follow is refused before its weights are read."""
        scheduler = model_json(self.config.path, "scheduler/scheduler_config.json", self.config.revision)
        check_guidance(self.config, scheduler["shift"])
        return super().load(parts)

    def latent_shape_of(self, config: ModelConfig) -> tuple[int, ...]:
        """(C, H, W) of the VAE's latents."""
        scale = self.pipeline.vae_scale_factor
        return (self.transformer.config.in_channels, config.height_px // scale, config.width_px // scale)

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """Qwen3's tokenizer, and the number of tokens that the chat turn around a prompt leaves to it."""
        tokenizer = self.pipeline.tokenizer
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return {"Qwen3": (tokenizer, int(self.settings["max_sequence_length"]) - len(tokenizer(turn)["input_ids"]))}

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: Qwen3's states of its chat turn, and their number."""
        (embeds,), _ = self.pipeline.encode_prompt(
            [prompt],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=int(self.settings["max_sequence_length"]),
        )
        return {"prompt_embeds": embeds[None], "lengths": torch.tensor([len(embeds)])}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the states and of their number for a prompt of `tokens` tokens."""
        return {"prompt_embeds": (tokens, self.transformer.config.cap_feat_dim), "lengths": ()}

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity of the latents, given as images of one frame, with prompts at their own lengths."""
        lengths = text.tensors["lengths"].tolist()
        prompts = [row[:length] for row, length in zip(text.tensors["prompt_embeds"], lengths, strict=True)]
        images = self.transformer([*latents.unsqueeze(2)], 1 - sigmas, prompts, return_dict=False)[0]
        return -torch.stack(images).squeeze(2)


def check_guidance(config: ModelConfig, shift: float) -> None:
    """Raise UserError for guidance that Turbo, which has a shift of its own, cannot follow."""
    if shift == TURBO_SHIFT and config.guidance_scale:
        raise UserError(
            f"model.guidance_scale must be 0 or null for {config.path!r}, a Turbo model that is distilled to draw "
            f"without guidance, got {config.guidance_scale:g}; Z-Image takes guidance"
        )
