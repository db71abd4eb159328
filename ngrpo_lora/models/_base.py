"""The base class of all model families; a family is a subclass named `Family` in a file of its own.

A family defines how its model computes velocities; loading, placement, guidance by two passes, the schedule and
LoRA files are the same for all and are diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from typing import Any, ClassVar, Literal, Self, TypeVar

import diffusers
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from ngrpo_lora.config import Expert, ModelConfig
from ngrpo_lora.devices import lent, without_cudnn_attention
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._attention import use_attention
from ngrpo_lora.models._levels import NoiseLevels
from ngrpo_lora.models._offload import blocks_of, swap_blocks
from ngrpo_lora.models._quantization import check_quantization, keep_inputs_whole, pipeline_quantization
from ngrpo_lora.models._recent import PromptCache, RecentPrompts
from ngrpo_lora.models._sizes import check_size
from ngrpo_lora.prompts.files import Prompt, as_prompt
from ngrpo_lora.types import TextEmbeds

Parts = Literal["all", "text", "image"]
Fuse = Callable[["BaseFamily"], None] | None
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""What diffusers and transformers raise for bad folders."""
Kind = TypeVar("Kind", bound="BaseFamily")
RELOADABLE = {
    *("height_px", "width_px", "num_frames", "guidance_scale", "guidance_scale_2"),
    *("max_sequence_length", "negative_prompt"),
}
"""Settings of a model that may change while it is loaded."""


class BaseFamily(NoiseLevels):
    """A flow model with text encoders and VAE. Latents are unpacked (B, C, H, W), of video (B, C, F, H, W), float32.

    A subclass sets the class attributes and defines `latent_shape_of`, `encode_alone`, `text_shapes`, `forward`,
    `tokenizers` and, where diffusers' usual VAE scaling does not fit, `decode`.
    """

    pipeline_class: ClassVar[str]
    """Name of the diffusers pipeline, by which `model.family: auto` finds the family."""

    text_encoders: ClassVar[tuple[str, ...]]
    """Pipeline components that are only needed to encode prompts; a model may come without some of them."""

    architecture: str
    """`modelspec.architecture` of the base, by which model managers find it."""

    kohya_version: str
    """`ss_base_model_version` of the base in kohya's metadata, by which model managers find it."""

    attention: ClassVar[tuple[str, ...]]
    """Suffixes of the attention layers that LoRA adapts."""

    feed_forward: ClassVar[tuple[str, ...]]
    """Suffixes of the feed-forward layers that LoRA adapts as well where `lora.targets` says so."""

    not_adapted: ClassVar[tuple[str, ...]] = ()
    """Full names of layers that one of these suffixes fits and that are not adapted."""

    distilled_guidance: ClassVar[bool] = False
    """Whether one forward pass is enough: guidance is distilled into the model, or it is drawn without guidance."""

    edits: ClassVar[bool] = False
    """Whether the model edits a source picture, or starts a video from it; every prompt has one, for `encode_edit`."""

    default_guidance: float
    """Guidance scale where the configuration gives none."""

    default_tokens: ClassVar[int] = 512
    """Number of prompt tokens where the configuration gives none."""

    size_multiple: int = 16
    """Height and width in pixels must be multiples of this number."""

    num_frames: int = 1
    """Number of frames of one sample: 1 for an image, more for a video."""

    def __init__(
        self, config: ModelConfig, device: str, parts: Parts = "all", base_is_sharded: bool = False, fuse: Fuse = None
    ):
        """Load the pipeline, or only the part of it that encodes prompts, or only the part that draws.

        Args:
            base_is_sharded: the transformer stays in system memory, from where FSDP brings each process its pieces.
            fuse: adds the files of `model.fuse` into the transformer, before it is placed on the device.
        Raises:
            UserError: not a model of this family, or it cannot be loaded, or the size does not fit it.
        """
        self.config, self.device, self.dtype = config, torch.device(device), getattr(torch, config.dtype)
        self.cache: PromptCache | None = None  # where there are no text encoders
        self.fused: dict[str, str] = {}  # digests of the files that `fuse` has added, by their names in `model.fuse`
        self.pipeline = self.load(parts)
        self.pipeline.set_progress_bar_config(disable=True)
        encoders: list[nn.Module | None] = [getattr(self.pipeline, name) for name in self.text_encoders]
        self.encoders = [encoder.requires_grad_(False).eval() for encoder in encoders if encoder is not None]
        if config.text_encoders == "keep":
            for encoder in self.encoders:
                encoder.to(self.device)
        self.draws = parts != "text"
        if self.draws:
            for transformer in self.transformers:
                transformer.requires_grad_(False).eval()
                if config.quantization == "int8":
                    keep_inputs_whole(transformer)
            self.transformer: Any = self.transformers[0]
        if self.draws or self.edits:
            self.vae: Any = self.pipeline.vae.requires_grad_(False).eval().to(self.device)
            if config.vae_tiling:
                self.vae.enable_tiling()
        self.configure(config)
        if self.draws:
            if fuse is not None:
                fuse(self)
            self.place(base_is_sharded)

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings that may change without reloading the model (`RELOADABLE`).

        Raises:
            UserError: the model cannot draw this size or number of frames.
        """
        self.config = config
        self.negative: TextEmbeds | None = None  # of guidance by two passes, encoded with the first prompts
        self.recent = RecentPrompts()
        guidance = self.default_guidance if config.guidance_scale is None else config.guidance_scale
        self.settings: dict[str, Any] = {
            "guidance_scale": guidance,
            "max_sequence_length": config.max_sequence_length or self.max_tokens(),
        }
        if not self.draws:
            return
        check_size(config, self.size_multiple)
        if self.num_frames == 1 and config.num_frames not in (None, 1):
            raise UserError(f"model.num_frames must be null for {config.path!r}, which draws no videos")
        self.latent_shape = self.latent_shape_of(config)

    def with_settings(self, config: ModelConfig) -> Self:
        """A view of this model with the `RELOADABLE` settings of `config`; weights and adapters are shared.

        Raises:
            UserError: as `configure`.
        """
        other = copy(self)
        other.configure(self.config.model_copy(update=config.model_dump(include=RELOADABLE)))
        return other

    def seen_as(self, kind: type[Kind]) -> Kind:
        """A view of this model as another family that its weights are for; weights and adapters are shared.

        Raises:
            UserError: as `configure`.
        """
        other = object.__new__(kind)
        vars(other).update(vars(self))
        other.configure(self.config)
        return other

    # What a family defines

    def latent_shape_of(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of one sample's latents at the configured size: (C, H, W), of a video (C, F, H, W)."""
        raise NotImplementedError

    def encode_alone(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt: the tensors of its conditioning by name, each (1, ...).

        Sequences of other lengths are padded with zeros when prompts are put together: give the number of tokens
        as `lengths`, (1,) int64 on the CPU, and cut or mask by it in `forward`.
        """
        raise NotImplementedError

    def encode_edit(self, prompt: str, source: Image.Image) -> dict[str, Tensor]:
        """Encode one prompt with its source, of `source_size`; for both passes where `guided` says so."""
        raise NotImplementedError

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of `encode_alone`'s tensors for a prompt of `tokens` tokens, without the 1: for `ngrpo plan`."""
        raise NotImplementedError

    def forward(self, latents: Tensor, sigmas: Tensor, text: TextEmbeds) -> Tensor:
        """One pass: (B, C, H, W) in the model's dtype, (B,) float32, B rows of text -> velocity like the latents."""
        raise NotImplementedError

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """Each tokenizer by its encoder's name, with how many tokens of a prompt reach that encoder."""
        raise NotImplementedError

    def max_tokens(self) -> int:
        """Number of prompt tokens where the configuration gives none."""
        return self.default_tokens

    @property
    def guided(self) -> bool:
        """Whether guidance takes a second forward pass, with the negative prompt in place of the prompt."""
        return not self.distilled_guidance and self.settings["guidance_scale"] > 1

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598) of velocities with and without the prompt, both (B, ...)."""
        return unconditional + self.settings["guidance_scale"] * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Clean latents (B, ...) -> B * num_frames RGB images, frames of a sample together."""
        pixels = self.vae.decode(self.vae_latents(latents.to(self.vae.dtype)), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(pixels, "pil")

    def vae_latents(self, latents: Tensor) -> Tensor:
        """Clean latents without the model's normalisation, as the VAE takes them and ComfyUI's graphs hold them."""
        config = self.vae.config
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

    # What all have in common

    def load(self, parts: Parts) -> Any:
        """Load the diffusers pipeline of this family with `from_pretrained`."""
        config = self.config
        if parts != "text" and isinstance(type(self).size_multiple, int):  # of others it is the loaded model's
            check_size(config, self.size_multiple)
        kind = getattr(diffusers, self.pipeline_class)
        quantized = None
        if parts != "text":
            check_quantization(config.quantization, self.device.type)
            quantized = pipeline_quantization(config.quantization, self.dtype)
        try:
            # bitsandbytes quantises on the current GPU, which need not be this process's.
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                pipeline = kind.from_pretrained(
                    self.source,
                    revision=config.revision,
                    dtype=self.dtypes,
                    quantization_config=quantized,
                    **dict.fromkeys(self.left_out(parts)),
                )
        except LOADING_ERRORS as error:
            raise UserError(
                f"model.path {config.path!r} could not be loaded as a {self.pipeline_class}: {str(error).strip(' .')}; "
                "files that are broken or missing must be had again from where the model is from"
            ) from error
        return pipeline

    def left_out(self, parts: Parts) -> tuple[str, ...]:
        """Names of the pipeline components that are not loaded for `parts`."""
        to_encode = ("transformer",) if self.edits else ("transformer", "vae")
        return {"text": to_encode, "image": self.text_encoders, "all": ()}[parts]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Number types in which the pipeline's components are loaded, by name; `default` is that of all others."""
        return {"default": self.dtype}

    def dtype_of(self, component: str) -> torch.dtype:
        """Number type in which a component is loaded."""
        return self.dtypes.get(component) or self.dtypes["default"]

    @property
    def source(self) -> str:
        """The folder or Hub id that diffusers loads the model from."""
        return str(self.config.path)

    def place(self, base_is_sharded: bool) -> None:
        """Move every transformer to the device; set block swapping and attention as configured."""
        for transformer in self.transformers:
            if self.config.swap_blocks:
                swap_blocks(blocks_of(transformer), self.config.swap_blocks, self.device)
            if not base_is_sharded:
                transformer.to(self.device)
        if self.config.attention is not None:
            for transformer in self.transformers:
                use_attention(transformer, self.config.attention, self.device, self.dtype)

    @property
    def transformers(self) -> list[Any]:
        """The transformer that the adapter is for, and where another one shares the noise levels with it, that one."""
        return [self.pipeline.transformer]

    def transformer_of(self, expert: Expert | None) -> Any:
        """The transformer that draws a part of the noise levels; for None the adapter's."""
        return self.transformer if expert in (None, self.expert) else self.transformers[1]

    def load_lora(self, source: Any, name: str, expert: Expert | None = None) -> None:
        """Put a LoRA file or its tensors beside what is adapted, with diffusers' loader, named `name`."""
        self.pipeline.load_lora_weights(source, adapter_name=name)

    def use_loras(self, names: str | list[str], strengths: float | list[float] | None = None) -> None:
        """Draw with these of the LoRAs that were loaded, each at its strength; None: as trained."""
        self.pipeline.set_adapters(names, strengths)

    def unload_loras(self) -> None:
        """Take every LoRA that was loaded off the model."""
        self.pipeline.unload_lora_weights()

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of every transformer, in the order in which they run."""
        return [block for transformer in self.transformers for block in blocks_of(transformer)]

    def compile_blocks(self) -> None:
        """Compile each transformer's blocks one by one with torch.compile."""
        # A block has a variant for every batch size, with gradient and without; beyond 8 it would run uncompiled.
        torch._dynamo.config.cache_size_limit = 64
        for block in self.blocks:
            block.compile()

    def lora_targets(self, targets: str) -> tuple[list[str], list[str]]:
        """The layers that a value of `lora.targets` means: (suffixes to adapt, full names to leave out)."""
        layers = self.attention + self.feed_forward if targets == "attention+feed_forward" else self.attention
        return [*layers], [name for name in self.not_adapted if name.endswith(layers)]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str | Prompt]) -> TextEmbeds:
        """Encode prompts: one row of conditioning for each, on the model's device, without gradient.

        Each prompt is encoded alone: kernels round differently for different batch sizes, and an image must not
        depend on what is drawn beside it.

        Raises:
            ConfigError: the model edits pictures, and a prompt has none that can be read; or it edits none.
        """
        if self.guided and not self.edits and self.negative is None:
            self.negative = self.encode_each([as_prompt(self.config.negative_prompt)])
        return self.encode_each([*map(as_prompt, prompts)])

    def encode_each(self, prompts: Sequence[Prompt]) -> TextEmbeds:
        """Encode the prompts that were not met lately, or take all from the cache, and put them together."""
        if self.cache is not None:
            return self.cache.encode(prompts, self.device)
        by_key = {prompt.condition: prompt for prompt in prompts}
        alone = self.recent.of(by_key)
        if new := [key for key in by_key if key not in alone]:
            with self.awake():
                alone |= {key: self.recent.keep(key, self.encode_one(by_key[key])) for key in new}
        return TextEmbeds.join([alone[prompt.condition] for prompt in prompts]).to(self.device)

    def encode_one(self, prompt: Prompt) -> dict[str, Tensor]:
        """Encode one prompt, with its source where the model edits."""
        if not self.edits and prompt.source is None:
            return self.encode_alone(prompt.text)
        if not self.edits or prompt.source is None:
            rule = "must have a source picture" if self.edits else "must have no source picture"
            found = "none" if prompt.source is None else repr(prompt.source.name)
            raise ConfigError(f"a prompt for {self.config.path!r} {rule}, but {prompt.told} has {found}")
        return self.encode_edit(prompt.text, prompt.source.fitted(*self.source_size))

    @property
    def source_size(self) -> tuple[int, int]:
        """(width, height) in pixels at which `encode_edit` gets sources: what is drawn, unless a family differs."""
        return self.config.width_px, self.config.height_px

    def edited_size(self, source: Image.Image) -> tuple[int, int]:
        """(height, width) in pixels at which a model that edits draws what becomes of a source best, about as large."""
        raise NotImplementedError

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Have the text encoders on the device within the context; offloaded ones are lent to it."""
        with ExitStack() as stack:
            if self.config.text_encoders != "keep":
                for encoder in self.encoders:
                    stack.enter_context(lent(encoder, self.device))
            yield

    def release_encoders(self) -> None:
        """Drop the text encoders to free their memory; `encode` needs a cache from then on."""
        self.encoders = []
        self.pipeline.register_modules(**dict.fromkeys(self.text_encoders))

    @without_cudnn_attention()  # in every pass: a compiled block keeps the kernel that it was compiled with
    def velocity(self, latents: Tensor, sigma: Tensor | float, text: TextEmbeds) -> Tensor:
        """Latents (B, ...), sigma scalar or (B,), B rows -> velocity (B, ...) float32, with gradient where enabled.

        Sigma reaches the model unrounded, as a float. Guidance by two passes guides here too, so that rollouts,
        updates and pictures see the same velocity.
        """
        batch = len(latents)
        if isinstance(sigma, Tensor):
            sigmas = sigma.to(self.device, torch.float32).expand(batch)
        else:
            sigmas = torch.full((batch,), sigma, device=self.device, dtype=torch.float32)
        inputs = latents.to(self.dtype)
        velocity = self.forward(inputs, sigmas, text).float()
        if not self.guided:
            return velocity
        return self.guide(velocity, self.forward(inputs, sigmas, self.without_prompt(text)).float())

    def without_prompt(self, text: TextEmbeds) -> TextEmbeds:
        """What the second pass of guidance takes for these rows: the negative prompt in each of them."""
        assert self.negative is not None, "encode() comes before velocity()"
        return self.negative[[0] * len(text)]
