"""FLUX.2: klein (black-forest-labs/FLUX.2-klein-4B and -9B, distilled; FLUX.2-klein-base-4B and -base-9B) and dev.

Source of the conventions: diffusers' `Flux2KleinPipeline` and `Flux2Pipeline` (pipelines/flux2). The transformer
takes sigma in [0, 1] and gives `noise - clean`. Latents are the VAE's 2 x 2 cells as channels, (128, H / 16, W / 16),
standardised by the running statistics of its batch norm; one cell is one token. Prompts are padded to the full length
and not masked in the transformer; their embedding is three hidden layers of Qwen3, for dev of Mistral, side by side.

Guidance: klein's distilled models (`is_distilled` in model_index.json, 4 steps) are drawn without; its base models (50
steps) by two passes, 4.0 recommended. Into dev (50 steps) it is distilled: one pass, 4.0. LoRA stays within the blocks:
for the layers that modulate all of them ComfyUI has no LoRA keys.

The same weights draw from text and, with `model.edits`, edit: the tokens of the source's latents, standardised too,
stand behind those that are drawn, at the same places but with 10 for the first coordinate of their positions. As in
diffusers, a source of more than 1024 x 1024 px is shrunk to that area; text encoder and schedule do not know of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError, first_line
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._edits import SourceFamily
from ngrpo_lora.models._index import model_index
from ngrpo_lora.types import TextEmbeds

MIN_SIDE_PX, MAX_ASPECT = 64, 8  # of a source, in diffusers
SOURCE_ASPECT = 6  # at most followed, as rounding to multiples of 16 makes small strips longer


class Flux2(BaseFamily):
    """What klein and dev have in common; `_base.BaseFamily` documents its members."""

    text_encoders = ("text_encoder",)
    attention = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        "to_qkv_mlp_proj",  # of the single blocks, whose feed-forward layers are fused with it and with `to_out`
    )
    feed_forward = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`, and recompute the positions of text and image tokens."""
        super().configure(config)
        tokens = int(self.settings["max_sequence_length"])
        self.text_ids = self.pipeline._prepare_text_ids(torch.empty(1, tokens, 1)).to(self.device)
        if self.draws:
            self.image_ids = self.pipeline._prepare_latent_ids(torch.empty(1, *self.latent_shape)).to(self.device)

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

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: the text encoder's states at full length, those of the padding included."""
        embeds, _ = self.pipeline.encode_prompt(
            [prompt], device=self.device, max_sequence_length=int(self.settings["max_sequence_length"])
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shape of the text encoder's states for a prompt of `tokens` tokens."""
        return {"prompt_embeds": (tokens, self.transformer.config.joint_attention_dim)}

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity of the latents, whose cells the transformer takes as a sequence of tokens."""
        tokens = self.transformer(
            hidden_states=self.tokens(self.pipeline._pack_latents(latents), text),
            timestep=sigmas,
            guidance=self.embedded_guidance(len(latents)),
            encoder_hidden_states=text.tensors["prompt_embeds"],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return tokens[:, : self.image_tokens].transpose(1, 2).reshape(latents.shape)

    def tokens(self, drawn: Tensor, text: TextEmbeds) -> Tensor:
        """What the transformer takes: the tokens (B, N, C) that are drawn, and those that they stand beside."""
        return drawn

    def embedded_guidance(self, batch: int) -> Tensor | None:
        """Guidance scales (batch,) that the transformer takes as an input; None for a model that takes none."""
        return None

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


class Family(Flux2):
    """FLUX.2 klein, distilled and base."""

    pipeline_class = "Flux2KleinPipeline"

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`; UserError for guidance that a distilled model cannot follow."""
        check_guidance(config, self.distilled_guidance)
        super().configure(config)

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

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """Qwen3's tokenizer, and the number of tokens that its chat template leaves to a prompt."""
        tokenizer = self.pipeline.tokenizer
        template = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        left = int(self.settings["max_sequence_length"]) - len(tokenizer(template)["input_ids"])
        return {"Qwen3": (tokenizer, left)}


class Dev(Flux2):
    """FLUX.2-dev, whose prompts Mistral reads behind the system message of diffusers."""

    pipeline_class = "Flux2Pipeline"
    architecture = "Flux.2-dev"
    kohya_version = "flux_2_dev"
    default_guidance = 4.0
    distilled_guidance = True

    def load(self, parts: Parts) -> Any:
        """Load the pipeline with the tokenizer of its processor, whose part for pictures would need torchvision.

        Raises:
            UserError: as `BaseFamily.load`, or the tokenizer cannot be read.
        """
        pipeline = super().load(parts)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.source, subfolder="tokenizer", revision=self.config.revision)
        except (OSError, ValueError, KeyError) as error:  # what transformers raises for bad folders
            raise UserError(
                f"model.path {self.config.path!r}: its folder tokenizer cannot be read ({first_line(error)}); copy "
                "the folder from the model that it was made from"
            ) from None
        pipeline.register_modules(tokenizer=tokenizer)
        return pipeline

    def left_out(self, parts: Parts) -> tuple[str, ...]:
        """Names of the pipeline components that are not loaded for `parts`, and the processor."""
        return (*super().left_out(parts), "tokenizer")

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """Mistral's tokenizer, and the number of tokens that system message and chat template leave to a prompt."""
        tokenizer = self.pipeline.tokenizer
        (template,) = tokenizer.apply_chat_template(
            format_input([""], self.pipeline.system_message), tokenize=True, return_dict=True
        )["input_ids"]
        return {"Mistral": (tokenizer, int(self.settings["max_sequence_length"]) - len(template))}

    def embedded_guidance(self, batch: int) -> Tensor:
        """Guidance scales (batch,) in float32, as the pipeline gives them."""
        return torch.full((batch,), float(self.settings["guidance_scale"]), device=self.device)


class Edit(SourceFamily, Flux2):
    """What all have that edit a source picture of the size that is drawn."""

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`, and compute the positions of the source's tokens behind the drawn ones.

        Raises:
            UserError: also where diffusers takes no source of this size.
        """
        check_source_size(config)
        super().configure(config)
        if self.draws:
            of_source = self.pipeline._prepare_image_ids([torch.empty(1, 1, *self.source_cells)])
            self.image_ids = torch.cat([self.image_ids, of_source.to(self.device)], 1)

    def load(self, parts: Parts) -> Any:
        """Load the pipeline; a size of which no source is taken is refused before weights are read."""
        check_source_size(self.config)
        return super().load(parts)

    @property
    def source_cells(self) -> tuple[int, int]:
        """Rows and columns of a source's latents."""
        cell_px, size = 2 * self.pipeline.vae_scale_factor, (self.config.width_px, self.config.height_px)
        width, height = Flux2ImageProcessor._resize_if_exceeds_area(Image.new("L", size)).size
        return height // cell_px, width // cell_px

    def encode_edit(self, prompt: str, source: Image.Image) -> dict[str, Tensor]:
        """Encode one prompt, the negative one too where it guides, and the source as tokens of its latents' mode."""
        cell_px, processor = 2 * self.pipeline.vae_scale_factor, self.pipeline.image_processor
        height, width = (cells * cell_px for cells in self.source_cells)
        shrunk = processor._resize_if_exceeds_area(source)
        pixels = processor.preprocess(shrunk, height=height, width=width, resize_mode="crop")
        latents = self.pipeline._encode_vae_image(pixels.to(self.device, self.vae.dtype), generator=None)
        return self.encode_texts(prompt) | {"source_tokens": self.pipeline._pack_latents(latents).to(self.dtype)}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the states of both prompts, if there are two passes, and of the tokens of a source."""
        return super().text_shapes(tokens) | {
            "source_tokens": (math.prod(self.source_cells), self.transformer.config.in_channels)
        }

    def tokens(self, drawn: Tensor, text: TextEmbeds) -> Tensor:
        """The tokens that are drawn, and the source's behind them."""
        return torch.cat([drawn, text.tensors["source_tokens"]], 1)

    def edited_size(self, source: Image.Image) -> tuple[int, int]:
        """(height, width): of the source's shape, at most `SOURCE_ASPECT`, and at most the configured area."""
        area, multiple = self.config.height_px * self.config.width_px, self.size_multiple
        aspect = min(max(source.height / source.width, 1 / SOURCE_ASPECT), SOURCE_ASPECT)
        height, width = (round(math.sqrt(part)) // multiple * multiple for part in (area * aspect, area / aspect))
        return max(height, MIN_SIDE_PX), max(width, MIN_SIDE_PX)


class KleinEdit(Edit, Family):
    """FLUX.2 klein with `model.edits`."""


class DevEdit(Edit, Dev):
    """FLUX.2-dev with `model.edits`."""


def check_source_size(config: ModelConfig) -> None:
    """Raise UserError for a size of which diffusers takes no source."""
    short, long = sorted((config.height_px, config.width_px))
    if short < MIN_SIDE_PX or long > MAX_ASPECT * short:
        raise UserError(
            f"model.height_px and model.width_px must be at least {MIN_SIDE_PX} and at most {MAX_ASPECT} : 1 with "
            f"model.edits of FLUX.2, got {config.height_px} and {config.width_px}; diffusers takes no other sources, "
            "so give both (--height and --width)"
        )


def check_guidance(config: ModelConfig, distilled: bool) -> None:
    """Raise UserError for guidance that a distilled model cannot follow."""
    if distilled and config.guidance_scale not in (None, 1):
        raise UserError(
            f"model.guidance_scale must be 1 or null for {config.path!r}, which is distilled to draw without "
            f"guidance, got {config.guidance_scale:g}; set it so (--guidance 1), or give FLUX.2-klein-base, which "
            "takes it"
        )
