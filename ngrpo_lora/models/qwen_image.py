"""Qwen-Image, Qwen-Image-2512 and fine-tunes of them; Qwen-Image-Edit, 2509 and 2511, which edit a source picture.

Source of the conventions: diffusers' `QwenImagePipeline`, `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`.

- Time: the transformer takes sigma itself, from 1 (noise) to 0, and gives `noise - clean`.
- Latents: 16 channels, normalised by the VAE's `latents_mean` and `latents_std`; the transformer takes 2 x 2 cells as
  one token. The VAE is a video VAE; an image is its first frame.
- Prompts: Qwen2.5-VL reads them within a template, whose first 34 states are dropped.
- Guidance: two passes at 4.0, after which every token has the norm that it has with the prompt alone. The model card's
  negative prompt is a blank, `model.negative_prompt=" "`.
- Schedule: the shift depends on the size; then the last noise level is stretched to the scheduler's `shift_terminal`.
- Edits: a source has about 1024 x 1024 px, whatever is drawn. Its tokens, encoded by the VAE, stand behind those that
  are drawn, as a second picture, and Qwen2.5-VL sees it before the prompt: whole, or of 2509 and 2511 at about
  384 x 384 px. It sees it before the negative prompt too, which is therefore encoded with each source.
- diffusers never cuts the prompt of an edit; here it is cut as those of Qwen-Image are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.equations.solvers import stretch_to_terminal
from ngrpo_lora.errors import ConfigError, UserError, first_line
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._qwen_vl import PICTURE, PictureProcessor
from ngrpo_lora.types import TextEmbeds

MAX_ASPECT = 32  # of an edit; Qwen2.5-VL takes no picture beyond 200
SOURCE_ASPECT = 16  # at most followed, as rounding to multiples of 32 makes small strips longer


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
            hidden_states=self.tokens(self.pipeline._pack_latents(latents, batch, channels, height, width), text),
            timestep=sigmas,
            encoder_hidden_states=text.tensors["prompt_embeds"][:, :longest],
            encoder_hidden_states_mask=None if valid.all() else valid.to(self.device),
            img_shapes=[self.grids] * batch,
            return_dict=False,
        )[0]
        tokens = packed[:, : height * width // 4].view(batch, height // 2, width // 2, channels, 2, 2)
        return tokens.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)

    def tokens(self, drawn: Tensor, text: TextEmbeds) -> Tensor:
        """What the transformer takes: the tokens (B, N, C) that are drawn, and those that they stand beside."""
        return drawn

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of the tokens of each picture before the transformer: here of the drawn one."""
        _, height, width = self.latent_shape
        return [(1, height // 2, width // 2)]

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


class Edit(Family):
    """Qwen-Image-Edit, which edits a source picture that Qwen2.5-VL sees too."""

    pipeline_class = "QwenImageEditPipeline"
    architecture = "Qwen-Image-Edit"
    edits = True
    source_area = 1024 * 1024
    """Pixels of a source, about, as the VAE encodes it."""

    def left_out(self, parts: Parts) -> tuple[str, ...]:
        """Names of the components that are not loaded: the processor too, which needs torchvision."""
        return (*super().left_out(parts), "processor")

    def load(self, parts: Parts) -> Any:
        """Load the pipeline as all families do, with a processor for pictures alone."""
        pipeline, revision = super().load(parts), self.config.revision or "main"
        try:
            found = Qwen2VLImageProcessorPil.from_pretrained(self.source, subfolder="processor", revision=revision)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.path {self.config.path!r} must have the settings of its image processor in processor/, which "
                f"cannot be read ({first_line(error)}); copy the folder from the model that it was made from"
            ) from None
        pipeline.processor = PictureProcessor(pipeline.tokenizer, found)
        return pipeline

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`; UserError for a strip beyond `MAX_ASPECT`."""
        sides = sorted((config.height_px, config.width_px))
        if sides[1] > MAX_ASPECT * sides[0]:
            raise UserError(
                f"model.height_px and model.width_px must be at most {MAX_ASPECT} : 1 for this model, got "
                f"{config.height_px} and {config.width_px}; make the longer one shorter"
            )
        super().configure(config)

    @property
    def source_size(self) -> tuple[int, int]:
        """(width, height) in pixels of a source before the VAE: of the drawn shape, and one that diffusers keeps."""
        size = dimensions(self.source_area, self.config.width_px / self.config.height_px)
        while (again := dimensions(self.source_area, size[0] / size[1])) != size:
            size = again
        return size

    @property
    def seen_size(self) -> tuple[int, int]:
        """(width, height) in pixels of the source before Qwen2.5-VL."""
        return self.source_size

    @property
    def picture_tokens(self) -> int:
        """Number of the source's tokens before Qwen2.5-VL, by the published settings where there is no processor."""
        processor = self.pipeline.processor or PictureProcessor(None, Qwen2VLImageProcessorPil(max_pixels=12845056))
        return processor.picture_tokens(*self.seen_size)

    def encode_edit(self, prompt: str, source: Image.Image) -> dict[str, Tensor]:
        """Encode one prompt beside its source, the negative one too where it guides, and the source's latents."""
        width, height = self.seen_size
        seen = self.pipeline.image_processor.resize(source, height, width)
        found = self.encode_beside(seen, prompt) | {"source_tokens": self.source_tokens(source)}
        if self.guided:
            negative = self.encode_beside(seen, self.config.negative_prompt)
            found |= {f"negative_{name}": tensor for name, tensor in negative.items()}
        return found

    def encode_beside(self, seen: Image.Image, prompt: str) -> dict[str, Tensor]:
        """Qwen2.5-VL's states of a picture, a prompt and the template's end, and their number.

        Raises:
            ConfigError: the prompt holds the token in whose place pictures stand.
        """
        if PICTURE in prompt:
            raise ConfigError(
                f"a prompt for {self.config.path!r} must not hold {PICTURE}, which stands for its source; take it out "
                f"of {prompt!r:.120}"
            )
        embeds, _ = self.pipeline.encode_prompt([prompt], [seen], device=self.device)
        embeds = embeds[:, : self.picture_tokens + int(self.settings["max_sequence_length"])]
        return {"prompt_embeds": embeds, "lengths": torch.tensor([embeds.shape[1]])}

    def source_tokens(self, source: Image.Image) -> Tensor:
        """(1, N, C) tokens of the mode of a source's latents, normalised."""
        pixels = self.pipeline.image_processor.preprocess(source)[:, :, None].to(self.device, self.vae.dtype)
        latents = self.pipeline._encode_vae_image(pixels, generator=None)
        return self.pipeline._pack_latents(latents, *latents[:, :, 0].shape).to(self.dtype)

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the states of both prompts, if there are two passes, and of the tokens of a source."""
        prompt = super().text_shapes(self.picture_tokens + tokens)
        negative = {f"negative_{name}": shape for name, shape in prompt.items()} if self.guided else {}
        source = {"source_tokens": (math.prod(self.grids[1]), self.transformer.config.in_channels)}
        return prompt | negative | source

    def without_prompt(self, text: TextEmbeds) -> TextEmbeds:
        """The negative prompt as it was encoded beside the source of each row, and the source."""
        own = text.tensors
        names = ("prompt_embeds", "lengths")
        negative = {name: own[f"negative_{name}"] for name in names}
        return TextEmbeds(negative | {"source_tokens": own["source_tokens"]})

    def tokens(self, drawn: Tensor, text: TextEmbeds) -> Tensor:
        """The tokens that are drawn, and the source's behind them."""
        return torch.cat([drawn, text.tensors["source_tokens"]], 1)

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of the drawn tokens and of the source's."""
        width, height = (side // (2 * self.pipeline.vae_scale_factor) for side in self.source_size)
        return [*super().grids, (1, height, width)]

    def edited_size(self, source: Image.Image) -> tuple[int, int]:
        """(height, width) of the source's shape, at most `SOURCE_ASPECT`, and of the configured area."""
        aspect = min(max(source.width / source.height, 1 / SOURCE_ASPECT), SOURCE_ASPECT)
        width, height = dimensions(self.config.height_px * self.config.width_px, aspect)
        return height, width


class EditPlus(Edit):
    """Qwen-Image-Edit-2509 and 2511, with one source: `Picture 1` of the template, seen small."""

    pipeline_class = "QwenImageEditPlusPipeline"
    architecture = "Qwen-Image-Edit-Plus"

    @property
    def seen_size(self) -> tuple[int, int]:
        """(width, height) in pixels of the source before Qwen2.5-VL, about 384 x 384."""
        width, height = self.source_size
        return dimensions(384 * 384, width / height)


def dimensions(area_px: int, aspect: float) -> tuple[int, int]:
    """(width, height) as diffusers rounds them to multiples of 32, of about an area and an aspect; at least 32."""
    width, height = calculate_dimensions(area_px, aspect)
    return max(width, 32), max(height, 32)


def cells(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H / 2, 2, W / 2, 2), in which one token is dimensions 1, 3 and 5."""
    batch, channels, height, width = latents.shape
    return latents.view(batch, channels, height // 2, 2, width // 2, 2)


def token_norms(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H / 2, 1, W / 2, 1), the Euclidean norm of each token."""
    return torch.linalg.vector_norm(cells(latents), dim=(1, 3, 5), keepdim=True)
