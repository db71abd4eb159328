"""HunyuanVideo 1.5: `hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v` and `-480p_i2v`, which starts from a
picture, 720p, distilled ones and fine-tunes.

Source of the conventions: diffusers' `HunyuanVideo15Pipeline` and `HunyuanVideo15ImageToVideoPipeline`
(pipelines/hunyuan_video1_5/).

- Time: the transformer takes 1000 * sigma and gives `noise - clean`. diffusers rounds it to the model's number type
  before the sines of the time embedding are taken; here they are taken of a float32.
- Latents: (C, 1 + (frames - 1) / 4, H / 16, W / 16), only scaled. Behind their channels stand as many that hold the
  latents of given frames and one that says which are given: without a first picture all of these are zeros, with one
  they hold the mode of its latents and ones in the first frame, zeros in the others.
- Prompts: Qwen2.5-VL reads them within a template, whose first 108 states are dropped; its last state but two counts.
  ByT5 reads what stands in quotation marks, the text that is to be seen. Padding of either is masked in diffusers, as
  are 729 tokens of a picture that is not there; here both are left out.
- A first picture is seen by SigLIP too: the 729 states of its last layer stand before the prompt's, in both passes.
- Guidance: two passes by a part of the pipeline, the guider, which has the scale: 6.0, of distilled models 1.0 (none).
- Schedule: a constant shift, 5.0 of 480p, 9.0 of 720p from text and 7.0 from a picture.
- LoRA: the pipeline has no loader of its own, only its transformer (`pipeline.transformer.load_lora_adapter`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora.config import Expert, ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._edits import SourceFamily
from ngrpo_lora.models._index import model_index, model_json
from ngrpo_lora.models.wan import check_frames, check_with_source
from ngrpo_lora.types import TextEmbeds

NAME = "HunyuanVideo 1.5"
GLYPH_TOKENS = 256  # of ByT5, to which the pipeline pads
PLAIN_GUIDER = {
    "guidance_rescale": 0.0,
    "use_original_formulation": False,
    "start": 0.0,
    "stop": 1.0,
    "enabled": True,
}
"""Settings of a guider that is nothing but classifier-free guidance in all steps, beside its scale."""


class Family(BaseFamily):
    """The HunyuanVideo 1.5 text-to-video family; `_base.BaseFamily` documents its members."""

    pipeline_class = "HunyuanVideo15Pipeline"
    text_encoders = ("text_encoder", "text_encoder_2")
    architecture = "hunyuan-video-1.5"
    kohya_version = "hunyuan_video_1_5"
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    feed_forward = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    default_tokens = 1000

    @property
    def default_guidance(self) -> float:
        """Guidance scale of the model's own guider."""
        return self.pipeline.guider.config.guidance_scale

    @property
    def not_adapted(self) -> tuple[str, ...]:
        """Layers of the prompt's refiner, and those of the last block whose output reaches no video."""
        config = self.transformer.config
        last = f"transformer_blocks.{config.num_layers - 1}"
        unused = ("attn.add_q_proj", "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
        own = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
        refiner = [f"context_embedder.token_refiner.refiner_blocks.{i}" for i in range(config.num_refiner_layers)]
        return (*(f"{last}.{layer}" for layer in unused), *(f"{block}.{layer}" for block in refiner for layer in own))

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`, whose number of frames must be one that latents can have."""
        if self.draws:
            check_times(config.path, self.pipeline.transformer.config)
        check_frames(config, NAME)
        super().configure(config)
        self.settings["num_frames"] = self.num_frames

    def load(self, parts: Parts) -> Any:
        """Load the pipeline; what this family cannot draw is refused before weights are read."""
        check_frames(self.config, NAME)
        check_guider(self.source, self.config.revision)
        check_times(self.source, model_json(self.source, "transformer/config.json", self.config.revision))
        return super().load(parts)

    def left_out(self, parts: Parts) -> tuple[str, ...]:
        """Names of the components that are not loaded: never the VAE, without which diffusers makes no pipeline."""
        return tuple(name for name in super().left_out(parts) if name != "vae")

    def place(self, base_is_sharded: bool) -> None:
        """Move the transformer to the device, and have it round timesteps no earlier than their embedding."""
        super().place(base_is_sharded)
        self.transformer.time_embed.timestep_embedder.register_forward_pre_hook(
            lambda _, given: (given[0].to(self.dtype), *given[1:])
        )

    @property
    def num_frames(self) -> int:
        """Configured number of frames, else those of five seconds at 24 frames a second."""
        return self.config.num_frames or 121

    def latent_shape_of(self, config: ModelConfig) -> tuple[int, ...]:
        """(C, F, H, W) of the latents, in which the first frame of a video stands alone."""
        frames = (self.num_frames - 1) // self.pipeline.vae_scale_factor_temporal + 1
        cell_px = self.pipeline.vae_scale_factor_spatial
        return (self.vae.config.latent_channels, frames, config.height_px // cell_px, config.width_px // cell_px)

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """Qwen2.5-VL's tokenizer and its token limit; of the template only the end counts, and is cut first."""
        return {"Qwen2.5-VL": (self.pipeline.tokenizer, int(self.settings["max_sequence_length"]))}

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: Qwen2.5-VL's states of it and of the template's end, and ByT5's of what is quoted."""
        self.pipeline.tokenizer_max_length = int(self.settings["max_sequence_length"])
        embeds, mask, glyphs, glyph_mask = self.pipeline.encode_prompt(prompt, self.device, self.dtype)
        seen = mask[0].bool()
        return {
            "prompt_embeds": embeds[:, seen],
            "lengths": seen.sum().cpu()[None],
            "glyph_prompt_embeds": glyphs,
            "glyph_lengths": glyph_mask.bool().sum(1).cpu(),
        }

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the states and of their numbers for a prompt of `tokens` tokens."""
        config = self.transformer.config
        return {
            "prompt_embeds": (tokens, config.text_embed_dim),
            "lengths": (),
            "glyph_prompt_embeds": (GLYPH_TOKENS, config.text_embed_2_dim),
            "glyph_lengths": (),
        }

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity of the latents, (B, C, F, H, W), with attention masked to the tokens of each prompt."""
        given = text.tensors
        prompts, valid = cut(given["prompt_embeds"], given["lengths"])
        glyphs, valid_glyphs = cut(given["glyph_prompt_embeds"], given["glyph_lengths"])
        return self.transformer(
            hidden_states=torch.cat([latents, self.given_frames(latents, text)], 1),
            timestep=sigmas * 1000,
            encoder_hidden_states=prompts,
            encoder_attention_mask=valid,
            encoder_hidden_states_2=glyphs,
            encoder_attention_mask_2=valid_glyphs,
            image_embeds=self.seen(latents, text),
            return_dict=False,
        )[0]

    def given_frames(self, latents: Tensor, text: TextEmbeds) -> Tensor:
        """(B, C + 1, F, H, W): latents of given frames, and which are given; of text alone none are."""
        return torch.cat(self.pipeline.prepare_cond_latents_and_mask(latents, latents.dtype, self.device), 1)

    def seen(self, latents: Tensor, text: TextEmbeds) -> Tensor:
        """(B, N, D): SigLIP's states of the first picture; of text alone there are none, N = 0."""
        return latents.new_zeros(len(latents), 0, self.transformer.config.image_embed_dim)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode clean latents one sample at a time, as the VAE must; frames of a sample follow one another."""
        frames: list[Image.Image] = []
        for sample in self.vae_latents(latents.to(self.vae.dtype)).split(1):
            pixels = self.vae.decode(sample, return_dict=False)[0]
            frames += [
                frame for video in self.pipeline.video_processor.postprocess_video(pixels, "pil") for frame in video
            ]
        return frames

    def load_lora(self, source: Any, name: str, expert: Expert | None = None) -> None:
        """Put a LoRA file or its tensors on the transformer by its own loader, as the pipeline has none."""
        self.transformer.load_lora_adapter(source, adapter_name=name, use_safetensors=True)

    def use_loras(self, names: str | list[str], strengths: float | list[float] | None = None) -> None:
        """Draw with these of the LoRAs that were loaded, each at its strength."""
        self.transformer.set_adapters(names, strengths)

    def unload_loras(self) -> None:
        """Take every LoRA off the transformer."""
        self.transformer.unload_lora()


class ImageToVideo(SourceFamily, Family):
    """HunyuanVideo 1.5 image-to-video: the source picture of a prompt is the first frame of its video."""

    pipeline_class = "HunyuanVideo15ImageToVideoPipeline"
    text_encoders = (*Family.text_encoders, "image_encoder")
    architecture = "hunyuan-video-1.5-i2v"

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`; UserError for a video of the source alone."""
        check_with_source(config, sees=False)
        super().configure(config)

    def load(self, parts: Parts) -> Any:
        """Load the pipeline; what this class cannot draw is refused before weights are read."""
        check_with_source(self.config, sees=False)
        check_siglip(self.source, model_index(self.source, self.config.revision))
        return super().load(parts)

    def encode_edit(self, prompt: str, source: Image.Image) -> dict[str, Tensor]:
        """Encode one prompt, the negative one where it guides, and the source: its condition and SigLIP's states."""
        seen = self.pipeline.encode_image(source, 1, self.device, self.dtype)
        return self.encode_texts(prompt) | {"condition": self.condition(source), "image_embeds": seen}

    def condition(self, source: Image.Image) -> Tensor:
        """(1, C + 1, F, H, W): the mode of the source's latents in the first frame, and which frames are given."""
        parts = self.pipeline.prepare_cond_latents_and_mask(
            torch.empty(1, *self.latent_shape_of(self.config), device="meta"),  # of which only the shape counts
            source,
            batch_size=1,
            height=self.config.height_px,
            width=self.config.width_px,
            dtype=self.dtype,
            device=self.device,
        )
        return torch.cat(parts, 1)

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the states of both prompts, if there are two passes, of the condition and of SigLIP's states."""
        channels, *rest = self.latent_shape
        return super().text_shapes(tokens) | {
            "condition": (channels + 1, *rest),
            "image_embeds": (self.pipeline.vision_num_semantic_tokens, self.transformer.config.image_embed_dim),
        }

    def given_frames(self, latents: Tensor, text: TextEmbeds) -> Tensor:
        """(B, C + 1, F, H, W): the condition of each row's source."""
        return text.tensors["condition"]

    def seen(self, latents: Tensor, text: TextEmbeds) -> Tensor:
        """(B, 729, D): SigLIP's states of each row's source."""
        return text.tensors["image_embeds"]

    def edited_size(self, source: Image.Image) -> tuple[int, int]:
        """(height, width) by the pipeline's own rule: of the source's shape, at most 4 : 1 and the configured area."""
        side_px = math.sqrt(self.config.height_px * self.config.width_px)
        return self.pipeline.video_processor.calculate_default_height_width(source.height, source.width, side_px)


def cut(states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """States (B, N, D) of the longest prompt's length, and which of them are of each row's own prompt, (B, N) bool."""
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    return states[:, : valid.shape[1]], valid.to(states.device)


def check_guider(path: str, revision: str | None) -> None:
    """Raise UserError for a model whose guider does not guide by a scale alone."""
    _, kind = model_index(path, revision).get("guider", (None, None))
    guider = {"_class_name": kind}
    if kind is not None:
        guider |= model_json(path, "guider/guider_config.json", revision)
    wanted = PLAIN_GUIDER | {"_class_name": "ClassifierFreeGuidance"}
    if others := [key for key, value in wanted.items() if guider.get(key, value) != value]:
        raise UserError(
            f"model.path {path!r} must have a ClassifierFreeGuidance with nothing but a guidance_scale for its guider, "
            f"but {', '.join(f'{key} is {guider[key]!r}' for key in others)}; give the plain one in guider/, and "
            "model.guidance_scale"
        )


def check_times(path: str, transformer: Mapping[str, Any]) -> None:
    """Raise UserError for a model whose transformer, of these settings, takes the time of the next step as well."""
    if transformer.get("use_meanflow"):
        raise UserError(
            f"model.path {path!r} must be a model that is given the time of a step alone, but use_meanflow of its "
            "transformer is true, as of the step-distilled one, which is given that of the next step too; give another "
            "HunyuanVideo 1.5"
        )


def check_siglip(path: str, index: Mapping[str, Any]) -> None:
    """Raise UserError for a model that starts from a picture, of this `model_index.json`, without SigLIP."""
    if None in index.get("image_encoder", [None]):
        raise UserError(
            f"model.path {path!r} must have SigLIP, whose states of the source its transformer takes, but it has no "
            "image_encoder; copy image_encoder/ and feature_extractor/, and their lines of model_index.json, from the "
            "model that it was made from"
        )
