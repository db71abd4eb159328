"""Stable Diffusion 3.5 Medium and Large, and 3 Medium: `stabilityai/stable-diffusion-3.5-medium`, `-3.5-large`,
`-3-medium-diffusers` and fine-tunes of them.

Source of the conventions: diffusers' `StableDiffusion3Pipeline`
(pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py).

- Time: the transformer takes 1000 * sigma, from 1000 (noise) to 0, and gives `noise - clean`.
- Latents: 16 channels, not packed, with the VAE's scale and shift.
- Prompts: the states of two CLIPs (77 tokens), followed by T5's (256), zeros in a folder without T5; and both CLIPs'
  pooled states. Always of the same length, no mask.
- Guidance: two passes at 4.5 (3.5 Medium), 3.5 (3.5 Large) or 7.0 (3 Medium). 3.5 Large Turbo is distilled
  and drawn at 1, in one pass; it has Large's configuration, and is told by its name.
- Schedule: a constant shift of 3, by which the lowest of the 1000 training times is shifted twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.equations.solvers import shifted
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._index import model_index, model_json
from ngrpo_lora.types import TextEmbeds

PARTS = ("transformer", "vae")  # whose settings say how large a picture can be
GUIDANCE = {"3-medium": 7.0, "3.5-medium": 4.5, "3.5-large": 3.5}


class Family(BaseFamily):
    """The Stable Diffusion 3 and 3.5 family; `_base.BaseFamily` documents its members."""

    pipeline_class = "StableDiffusion3Pipeline"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    feed_forward = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    default_tokens = 256

    @property
    def version(self) -> Literal["3-medium", "3.5-medium", "3.5-large"]:
        """Which of the three models: only 3.5 Medium has second attentions, only 3 Medium no normalised queries."""
        config = self.pipeline.transformer.config
        if config.qk_norm is None:
            return "3-medium"
        return "3.5-medium" if config.dual_attention_layers else "3.5-large"

    @property
    def architecture(self) -> str:
        """`modelspec.architecture` as Stability AI's own files have it."""
        return f"stable-diffusion-v{self.version}"

    @property
    def kohya_version(self) -> str:
        """The value of `ss_base_model_version` in the header of an export, as sd-scripts writes it."""
        return self.version.replace(".", "-")

    @property
    def default_guidance(self) -> float:
        """Guidance scale that the model card recommends; 1, none, for a model with `turbo` in its folder or name."""
        return 1.0 if "turbo" in Path(self.config.path).name.lower() else GUIDANCE[self.version]

    @property
    def not_adapted(self) -> tuple[str, ...]:
        """The last block's query layer of the prompt, whose output is not used."""
        return (f"transformer_blocks.{self.pipeline.transformer.config.num_layers - 1}.attn.add_q_proj",)

    def left_out(self, parts: Parts) -> tuple[str, ...]:
        """Components that are not loaded, T5 among them where the model comes without it: diffusers must be told."""
        index = model_index(self.source, self.config.revision)
        absent = [name for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None]
        return (*super().left_out(parts), *absent)

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`; UserError for a side that the transformer has no positions for."""
        if self.draws:
            check_sides(config, self.pipeline.transformer.config, self.pipeline.vae_scale_factor)
        super().configure(config)

    def load(self, parts: Parts) -> Any:
        """Load the pipeline; if only prompts are encoded, its transformer has a configuration and no weights.

        A side that it has no positions for is refused before its weights are read.
        """
        if parts != "text":
            transformer, vae = (model_json(self.source, f"{x}/config.json", self.config.revision) for x in PARTS)
            check_sides(self.config, transformer, 2 ** (len(vae["block_out_channels"]) - 1))
        pipeline = super().load(parts)
        if parts == "text":
            kind = diffusers.SD3Transformer2DModel
            config: Any = kind.load_config(self.source, subfolder="transformer", revision=self.config.revision)
            with torch.device("meta"):
                pipeline.register_modules(transformer=kind.from_config(config))
        return pipeline

    def latent_shape_of(self, config: ModelConfig) -> tuple[int, ...]:
        """(C, H, W) of the VAE's latents."""
        scale = self.pipeline.vae_scale_factor
        return (self.transformer.config.in_channels, config.height_px // scale, config.width_px // scale)

    def sigmas(self, num_steps: int, shift: float | None = None) -> Tensor:
        """(K + 1,) noise levels: K times from 1 to the shifted 1 / 1000, shifted (again), then 0.

        The last step is therefore a very small one, as in the reference code and in diffusers.
        """
        shift = shift or self.shift(num_steps)
        lowest = shifted(torch.tensor(1e-3, dtype=torch.float64), shift).item()
        times = torch.linspace(1, lowest, num_steps, dtype=torch.float64)
        return torch.cat([shifted(times, shift), times.new_zeros(1)]).float()

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """The tokenizer of both CLIPs, whose vocabularies are one, and T5's where the model has it."""
        clip, t5 = self.pipeline.tokenizer, self.pipeline.tokenizer_3
        own = {"CLIP": (clip, clip.model_max_length)}
        return own | ({"T5": (t5, int(self.settings["max_sequence_length"]))} if t5 else {})

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: the states of all three encoders, and the pooled states of both CLIPs."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [prompt],
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=int(self.settings["max_sequence_length"]),
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the states, CLIP's 77 before T5's `tokens`, and of the pooled states."""
        config = self.transformer.config
        return {
            "prompt_embeds": (77 + tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity of the latents, which the transformer cuts into patches by itself."""
        return self.transformer(
            hidden_states=latents,
            timestep=1000 * sigmas,
            encoder_hidden_states=text.tensors["prompt_embeds"],
            pooled_projections=text.tensors["pooled_prompt_embeds"],
            return_dict=False,
        )[0]


def check_sides(config: ModelConfig, transformer: Mapping[str, Any], cell_px: int) -> None:
    """Raise UserError for a side of more patches than the transformer has positions for; latents have `cell_px`."""
    most_px = transformer["pos_embed_max_size"] * transformer["patch_size"] * cell_px
    for side, size_px in (("height_px", config.height_px), ("width_px", config.width_px)):
        if size_px > most_px:
            raise UserError(
                f"model.{side} must be at most {most_px} for {config.path!r}, which has positions for no more, got "
                f"{size_px}; make it smaller"
            )
