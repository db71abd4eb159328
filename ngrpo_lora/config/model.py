"""The schema of `model`: which model is tuned, how it is asked for images, and how it is kept in memory."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ngrpo_lora import registry
from ngrpo_lora.config.paths import AdapterText, FolderText, parse_weighted
from ngrpo_lora.config.section import DEVICE_PATTERN, Section

__all__ = ["Expert", "ModelConfig"]

Expert = Literal["high_noise", "low_noise"]


class ModelConfig(Section, frozen=True):
    """Which model is tuned and how it is asked for images."""

    family: str = Field(
        default="auto", description="Model family: a file in ngrpo_lora/models; auto: by the pipeline's class."
    )
    path: FolderText = Field(
        default="embedded",
        min_length=1,
        description="embedded, embedded-edit, a local diffusers folder, or a Hub model id.",
    )
    revision: str | None = Field(default=None, description="Hub branch, tag or commit; null: the default branch.")
    fuse: dict[AdapterText, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default={},
        description="LoRA files (owner/name/file.safetensors on the Hub; embedded-turbo) that are added into the "
        "frozen base as it is loaded, with their strengths, {lightning.safetensors: 1.0}, or names alone: what "
        "distils the base into few steps, say. The trained adapter works beside them.",
    )
    edits: bool | None = Field(
        default=None,
        description="Of a model that both draws and edits (FLUX.2): true edits the source picture of each prompt. "
        "null: it draws, and edits in `ngrpo sample --source`; every other model does what it is for.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Number type of the frozen base; the LoRA is always float32. "
        "auto: bfloat16 where the device computes in it, otherwise float32.",
    )
    device: str = Field(
        default="auto",
        pattern=DEVICE_PATTERN,
        description="auto (prefers a GPU), cpu, cuda, cuda:N or mps.",
    )
    height_px: int = Field(default=64, ge=16, le=8192, description="Image height in pixels, a multiple of 16.")
    width_px: int = Field(default=64, ge=16, le=8192, description="Image width in pixels, a multiple of 16.")
    expert: Expert | None = Field(
        default=None,
        description="Of a model with a transformer for high noise levels and one for low ones (Wan 2.2 A14B): the one "
        "that the adapter is for; the other is frozen and draws its steps. null: high_noise.",
    )
    guidance_scale: float | None = Field(default=None, ge=0, description="Guidance; null: what the model recommends.")
    guidance_scale_2: float | None = Field(
        default=None,
        ge=0,
        description="Guidance of the low_noise transformer of such a model; null: model.guidance_scale where that is "
        "given, else what the model recommends. As in diffusers, none where model.guidance_scale is at most 1.",
    )
    max_sequence_length: int | None = Field(
        default=None, ge=1, description="Prompt tokens; null: what the model recommends."
    )
    negative_prompt: str = Field(
        default="", description="What guidance by two passes leads away from; models with distilled guidance ignore it."
    )
    num_frames: int | None = Field(
        default=None, ge=1, le=4093, description="Frames of a video, 4 k + 1; null: what the model recommends."
    )
    quantization: Literal["none", "nf4", "int8", "int8_torchao", "float8_torchao"] = Field(
        default="none",
        description="Storage of the frozen transformer: bitsandbytes' NF4 or INT8, torchao's INT8 or FP8.",
    )
    swap_blocks: int = Field(
        default=0, ge=0, description="Transformer blocks that wait in system memory and visit the GPU in turn."
    )
    text_encoders: Literal["keep", "offload", "cache"] = Field(
        default="keep",
        description="keep: on the model's device; offload: in system memory between uses; cache: all prompts of the "
        "run are encoded before it, into output_dir/embeddings, and the encoders are never beside the transformer.",
    )
    vae_tiling: bool = Field(default=False, description="Decode in overlapping tiles: less memory for large pictures.")
    attention: str | None = Field(
        default=None,
        description="diffusers' attention backend, such as flash or _native_cudnn; null: PyTorch's choice.",
    )
    compile: bool = Field(default=False, description="torch.compile the transformer's repeated blocks.")

    @field_validator("fuse", mode="before")
    @classmethod
    def _with_strengths(cls, value: object) -> object:
        """A name, or several, stand for these at strength 1, or at that behind a colon; each file is named once."""
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            pairs = [parse_weighted(name) for name in names]
        elif isinstance(names, dict):
            pairs = [*names.items()]
        else:
            return value
        for place, (name, _) in enumerate(pairs):
            if any(os.path.abspath(name) == os.path.abspath(other) for other, _ in pairs[:place]):
                raise ValueError(f"must name each file once, got {name!r} twice; add up the strengths")
        return dict(pairs)

    @field_validator("family")
    @classmethod
    def _family_exists(cls, value: str) -> str:
        if value != "auto":
            registry.check_name(registry.MODELS, value)
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        if self.compile and self.quantization == "nf4":
            raise ValueError("model.compile must be false with model.quantization=nf4, got true; int8_torchao compiles")
        if self.fuse and self.quantization != "none":
            raise ValueError(
                f"model.fuse must be empty with a quantised base, got {', '.join(self.fuse)}; `ngrpo merge FILE --base "
                "FOLDER --output MERGED` writes a base that holds it and can be quantised"
            )
        if self.swap_blocks and self.compile:
            raise ValueError(f"model.swap_blocks must be 0 with model.compile=true, got {self.swap_blocks}")
        if self.swap_blocks and self.quantization != "none":
            raise ValueError(
                f"model.swap_blocks must be 0 with a quantised base, got {self.swap_blocks}; swap the blocks of a "
                "16-bit base, or quantise"
            )
        return self

    @field_validator("height_px", "width_px")
    @classmethod
    def _multiple_of_16(cls, value: int) -> int:
        if value % 16:
            below = value // 16 * 16
            raise ValueError(f"must be a multiple of 16, got {value}; the nearest are {below} and {below + 16}")
        return value
