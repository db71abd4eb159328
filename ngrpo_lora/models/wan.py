"""Wan: text to video by Wan2.1-T2V, Wan2.2-TI2V-5B and Wan2.2-T2V-A14B, picture to video by Wan2.1-I2V-14B (480P,
720P) and Wan2.2-I2V-A14B.

Source of the conventions: diffusers' `WanPipeline` and `WanImageToVideoPipeline` (pipelines/wan/). The transformer
takes 1000 * sigma and gives `noise - clean`. Latents are (C, 1 + (frames - 1) / 4, H / 8, W / 8), of TI2V-5B H / 16
and W / 16, standardised channel by channel (`latents_mean`, `latents_std`). UMT5's embeddings are cut at the prompt's
end and padded with zeros to 512 tokens, which are not masked. Without a first picture all timesteps of TI2V-5B's
`expand_timesteps` are equal: one a sample says the same.

Guidance by two passes, 5.0 recommended; of Wan 2.2 A14B, a pair of transformers of which each draws one part of the
steps (`_experts.py`), 4.0 at high noise and 3.0 at low. Sigmas run from 1 linearly to 0 before `flow_shift`, as in
Wan's own code; diffusers' UniPC scheduler starts 1e-6 lower and is up to 0.001 higher before the shift.

Image-to-video takes a source picture as the first frame. Behind the channels of the latents stand 4 that say which
frames are given, and those of the VAE's latents of the source followed by frames of 0, which is grey: the condition.
Wan 2.1 attends to CLIP's states of the source too, those before its last layer. Guidance of both transformers of Wan
2.2 is 3.5. A last frame (Wan2.1-FLF2V) is not taken, nor a first one by TI2V-5B, whose timesteps differ by token then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import WanPipeline
from PIL import Image
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import Parts
from ngrpo_lora.models._edits import SourceFamily
from ngrpo_lora.models._experts import ExpertsFamily
from ngrpo_lora.models._index import model_index, model_json
from ngrpo_lora.types import TextEmbeds

SOURCE_ASPECT = 16  # at most followed: a transformer has positions for sides of 1024 patches
TEXT_TOKENS = 512
CLIP_TOKENS = 257  # of a picture of 224 x 224 pixels in patches of 14 x 14, and the one of the class


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
        check_frames(config, "Wan")
        super().configure(config)
        self.settings["num_frames"] = self.num_frames

    def load(self, parts: Parts) -> Any:
        """Load the pipeline; what this family cannot draw is refused before weights are read."""
        check_frames(self.config, "Wan")
        return super().load(parts)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Number types of the components: float32 for the VAE, as in the model cards' examples."""
        return super().dtypes | {"vae": torch.float32}

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
        return (self.vae.config.z_dim, frames, config.height_px // cell_px, config.width_px // cell_px)

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """UMT5's tokenizer and its token limit."""
        return {"UMT5": (self.pipeline.tokenizer, int(self.settings["max_sequence_length"]))}

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: UMT5's states, padded with zeros."""
        # The function is the same in all of Wan's pipelines, but without ftfy the image-to-video one's fails.
        embeds = WanPipeline._get_t5_prompt_embeds(
            self.pipeline, [prompt], max_sequence_length=int(self.settings["max_sequence_length"]), device=self.device
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shape of UMT5's states for a prompt of `tokens` tokens."""
        return {"prompt_embeds": (tokens, self.transformer.config.text_dim)}

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity of the latents, (B, C, F, H, W)."""
        given = text.tensors
        return self.transformer(
            hidden_states=torch.cat([latents, given["condition"]], 1) if "condition" in given else latents,
            timestep=sigmas * 1000,
            encoder_hidden_states=given["prompt_embeds"].to(self.dtype),
            encoder_hidden_states_image=given.get("image_embeds"),
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


class ImageToVideo(SourceFamily, Family):
    """Wan image-to-video: the source picture of a prompt is the first frame of its video."""

    pipeline_class = "WanImageToVideoPipeline"
    text_encoders = ("text_encoder", "image_encoder")
    attention = (*Family.attention, "add_k_proj", "add_v_proj")
    default_guidances = (3.5, 3.5)

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`; UserError for those that do not go with a first frame."""
        sees = False
        if self.draws:
            transformer = self.pipeline.transformer.config
            check_first_frame(config.path, self.pipeline.config, transformer)
            sees = transformer.image_dim is not None
        check_with_source(config, sees)
        super().configure(config)

    def load(self, parts: Parts) -> Any:
        """Load the pipeline; what this class cannot draw is refused before weights are read."""
        index, transformer = model_index(self.source, self.config.revision), self.transformer_json()
        check_first_frame(self.source, index, transformer)
        check_clip(self.source, index, transformer)
        check_with_source(self.config, transformer.get("image_dim") is not None)
        return super().load(parts)

    def left_out(self, parts: Parts) -> tuple[str, ...]:
        """Names of the components that are not loaded: CLIP too where the transformer takes none of its states."""
        clip = () if self.transformer_json().get("image_dim") else ("image_encoder", "image_processor")
        return super().left_out(parts) + clip

    def transformer_json(self) -> dict[str, Any]:
        """The settings of the transformer, before it is loaded; those of both of a pair are alike."""
        return model_json(self.source, "transformer/config.json", self.config.revision)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Number types of the components: float32 for CLIP too, as in the model cards' examples."""
        return super().dtypes | {"image_encoder": torch.float32}

    @property
    def architecture(self) -> str:
        """`modelspec.architecture`: Wan 2.1's is a single transformer, Wan 2.2's a pair."""
        return "wan2.1-i2v" if self.expert is None else "wan2.2-i2v-a14b"

    def encode_edit(self, prompt: str, source: Image.Image) -> dict[str, Tensor]:
        """Encode one prompt, the negative one where it guides, and the source: its condition and CLIP's states."""
        found = self.encode_texts(prompt) | {"condition": self.condition(source)}
        if self.pipeline.image_encoder is not None:
            found["image_embeds"] = self.pipeline.encode_image(source, self.device).to(self.dtype)
        return found

    def condition(self, source: Image.Image) -> Tensor:
        """(1, 4 + C, F, H, W): which frames are given, and the mode of the latents of a source and of grey frames."""
        size = {"height": self.config.height_px, "width": self.config.width_px}
        pixels = self.pipeline.video_processor.preprocess(source, **size).to(self.device, torch.float32)
        _, condition = self.pipeline.prepare_latents(
            pixels,
            1,
            **size,
            num_frames=self.num_frames,
            dtype=torch.float32,
            device=self.device,
            latents=pixels.new_empty(0),  # or noise would be drawn
        )
        return condition.to(self.dtype)

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of UMT5's states of both prompts, if there are two passes, of the condition and of CLIP's states."""
        channels, *rest = self.latent_shape
        config, encoder = self.transformer.config, self.pipeline.image_encoder
        shapes = super().text_shapes(tokens)
        if config.image_dim is not None:
            seen = 1 + (encoder.config.image_size // encoder.config.patch_size) ** 2 if encoder else CLIP_TOKENS
            shapes["image_embeds"] = (seen, config.image_dim)
        return shapes | {"condition": (config.in_channels - channels, *rest)}

    def edited_size(self, source: Image.Image) -> tuple[int, int]:
        """(height, width): of the source's shape, at most `SOURCE_ASPECT`, and at most the configured area.

        Source: the example of the model cards, which cuts sides down to multiples of a patch.
        """
        area, multiple = self.config.height_px * self.config.width_px, self.size_multiple
        aspect = min(max(source.height / source.width, 1 / SOURCE_ASPECT), SOURCE_ASPECT)
        height, width = (max(1, round(math.sqrt(part)) // multiple) for part in (area * aspect, area / aspect))
        return height * multiple, width * multiple


RULE = "must be a model that is drawn from a first frame as Wan2.1-I2V and Wan2.2-I2V-A14B are"


def check_first_frame(path: str, settings: Mapping[str, Any], transformer: Mapping[str, Any]) -> None:
    """Raise UserError for a model that is not drawn from a source as the first frame alone.

    Args:
        settings: of its pipeline. transformer: settings of its transformer.
    """
    rule = f"model.path {path!r} {RULE}"
    if settings.get("expand_timesteps"):
        raise UserError(
            f"{rule}, but expand_timesteps in its model_index.json is true, as of TI2V-5B, whose tokens have timesteps "
            "of their own then; give one of these, or draw with it from text alone: _class_name WanPipeline"
        )
    if (length := transformer.get("pos_embed_seq_len")) is not None:
        raise UserError(
            f"{rule}, but pos_embed_seq_len of its transformer is {length}: it takes a last frame too, as Wan2.1-FLF2V "
            "does; give one of these"
        )


def check_clip(path: str, index: Mapping[str, Any], transformer: Mapping[str, Any]) -> None:
    """Raise UserError for a model, of this `model_index.json`, without the CLIP whose states its transformer takes."""
    if transformer.get("image_dim") and None in index.get("image_encoder", [None]):
        raise UserError(
            f"model.path {path!r} {RULE}, but its transformer takes CLIP's states of the source and it "
            "has no image_encoder; copy image_encoder/ and image_processor/, and their lines of model_index.json, from "
            "the model that it was made from"
        )


def check_with_source(config: ModelConfig, sees: bool) -> None:
    """Raise UserError for a video of the source alone, or a number of prompt tokens that hides the source from CLIP.

    Args:
        sees: whether the transformer takes CLIP's states of the source.
    """
    if config.num_frames == 1:
        raise UserError(
            f"model.num_frames must be 5 or more for {config.path!r}, whose first frame is the source picture, got 1; "
            "give 5, 9, 13, ..., or null for the model's own number"
        )
    # diffusers' `WanAttnProcessor` takes the last 512 states for the prompt's, and those before them for the source's.
    if sees and config.max_sequence_length not in (None, TEXT_TOKENS):
        raise UserError(
            f"model.max_sequence_length must be {TEXT_TOKENS} for {config.path!r}, whose transformer tells the states "
            f"of the source from those of the prompt by this number, got {config.max_sequence_length}; leave it out"
        )


def check_frames(config: ModelConfig, model: str) -> None:
    """Raise UserError for a number of frames that the latents of `model`, a name, cannot have."""
    frames = config.num_frames
    if frames is not None and frames % 4 != 1:
        below = max(1, frames - (frames - 1) % 4)
        raise UserError(
            f"model.num_frames must be 4 k + 1 (1, 5, 9, ...) for {model}, got {frames}; the nearest are {below} and "
            f"{below + 4}"
        )
