"""Common base of the pipelines beside this file: what they add to diffusers' own.

- The exact scheduler: pictures are those that the trainer saw.
- An adapter's own settings, from its header: what a call leaves out is as in training.
- Every picture is drawn alone, and is a function of weights, prompt, seed and settings, to the bit.
- `neighbors`: a group around one seed, as Neighbor GRPO perturbs it (arXiv 2511.16955, Eq. 7).

Needs what diffusers needs for LoRA, and no package of ours.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import get_adapter_name, logging
from huggingface_hub import hf_hub_download, model_info
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

log = logging.get_logger(__name__)

FILE_NAME = "pytorch_lora_weights.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
REMEDY = "`ngrpo export FILE --format diffusers` writes what it does"
OTHER = "load the base that it was trained on"
SOLVER_ORDER = {"euler": 1, "dpmpp_2m": 2}
TEXTS = r"(base_model\.model\.)?(lora_(prior_)?te\d*_|(lora_)?text_encoders?[._]|clip_[lgh]\.|t5xxl\.|bundle_emb\.)"
WHERE = ("weight_name", "subfolder", "revision", "cache_dir", "token", "force_download", "local_files_only")

StockPipeline: Any = object  # in whose place the next base of the class comes


@dataclass(frozen=True)
class Settings:
    """Settings that an adapter was trained with; `own_shift` is what its run configured, None the base's own rule."""

    num_steps: int
    solver: str
    shift: float
    own_shift: float | None
    guidance_scale: float
    negative_prompt: str
    max_sequence_length: int
    height: int
    width: int
    perturbation_strength: float | None
    fused: tuple[str, ...] = ()
    """LoRA files that the base had taken in."""


class NeighborGRPOMixin(StockPipeline):
    """Mixin to be named before a stock pipeline among a class's bases; its attributes say how that one works."""

    scheduler_class: ClassVar[Any]
    """`FlowDPMSolverMultistepScheduler`, imported by the pipeline's own file, where diffusers looks for imports."""

    from_image_class: ClassVar[Any] = None
    """The stock pipeline of the same model that starts from an image; None where a model edits."""

    edits: ClassVar[bool] = False
    """Whether the stock pipeline edits `image`; it then has `edited_size` of its own."""

    needs_image: ClassVar[bool] = True
    """Whether a pipeline that edits does nothing else; if not, it draws from words where there is no `image`."""

    guided_by: ClassVar[str] = "guidance_scale"
    """Name of the call's argument that takes an adapter's guidance."""

    unguided: ClassVar[float | None] = 1.0
    """The highest guidance that needs one pass alone; None: guidance is distilled, and there is no negative prompt."""

    packs_latents: ClassVar[bool] = False
    """Whether the stock pipeline takes `latents` as tokens of 2 x 2 cells."""

    _settings: dict[str, Settings] = {}  # by adapter, in the order of loading
    _texts: dict[str, Any] | None = None  # embeddings of the prompt that is being drawn

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        seeds: int | Sequence[int] | None = None,
        neighbors: int | None = None,
        perturbation_strength: float | None = None,
        solver: Literal["dpmpp_2m", "euler"] | None = None,
        shift: float | None = None,
        image: Any = None,
        strength: float | None = None,
        **call: Any,
    ) -> Any:
        """Draw one picture after the other, with all arguments of the stock pipeline and seven more.

        What is left out is taken from the active adapter's header: steps, solver, shift, guidance, negative prompt,
        prompt tokens, size. Of several adapters the one that was loaded first counts.

        Args:
            seeds: every prompt is drawn with every seed, prompt-major; in place of `generator`.
            neighbors: G; every seed gives a group of G pictures, whose noises `sqrt(1 - r^2) * base + r * delta_i`
                are those of a trainer's group of that seed.
            perturbation_strength: r in (0, 1]; default: the adapter's in training.
            solver: DPM-Solver++ 2M by default, or Euler's method.
            shift: timestep shift of the schedule; default: the adapter's at its own size, otherwise the base's.
            image: picture to start from, by the stock image-to-image pipeline; or a list, one for each prompt. A seed
                is then that of the pipeline's generator. Of a model that edits: the picture to edit, by PIL, scaled to
                cover what is drawn and cut to its middle. Height and width that are left out then suit the first one.
            strength: in (0, 1], the share of the steps that is taken from an image; default: that pipeline's.
        Returns:
            What the stock pipeline returns.
        Raises:
            ValueError: arguments that do not go together, or a size that the model does not have.
        """
        stock = inspect.signature(super().__call__)
        if args and is_text(args[0]):  # the prompt comes first, also where the stock pipeline has `image` before it
            stock = stock.replace(parameters=[one for name, one in stock.parameters.items() if name != "image"])
        call = stock.bind_partial(*args, **call).arguments
        call = {name: value for name, value in call.items() if value is not None}
        image = call.pop("image", image)  # where the stock pipeline has it first
        for kwargs in (value for name, value in call.items() if name.endswith("attention_kwargs")):
            check_strengths(kwargs.get("scale"))
        settings, edits = self._active_settings(), self.edits and (self.needs_image or image is not None)
        if edits and not call.keys() & {"height", "width"}:
            sides = (settings.height, settings.width) if settings else (self._default_side(),) * 2
            call["height"], call["width"] = self.edited_size(first_picture(image), sides[0] * sides[1])
        if settings is not None:
            call = self._defaults(settings, call) | call
            if perturbation_strength is None:
                perturbation_strength = settings.perturbation_strength
        height, width = (call.setdefault(side, self._default_side()) for side in ("height", "width"))
        multiple = 2 * self.vae_scale_factor
        if height % multiple or width % multiple:
            raise ValueError(f"height and width must be multiples of {multiple} here, got {height} and {width}")
        if (steps := call.get("num_inference_steps", 1)) < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        scheduler = self._exact_scheduler(settings, height, width, solver, shift)
        return_dict, images_per_prompt = call.pop("return_dict", True), call.pop("num_images_per_prompt", None)
        prompts = split_prompts(call)
        count = len(prompts) * (images_per_prompt or 1)
        if seeds is not None and (images_per_prompt is not None or "generator" in call or "latents" in call):
            raise ValueError("seeds stands for num_images_per_prompt, generator and latents: give either")
        if neighbors is not None and seeds is None:
            raise ValueError(f"neighbors={neighbors} needs seeds, around which neighbours are drawn, got none")
        drawing, draw = self, super().__call__
        if edits:
            sources = edit_sources(image, strength, len(prompts), *self.source_size(width, height))
            prompts = [prompt | {"image": source} for prompt, source in zip(prompts, sources, strict=True)]
            call, image, strength = call | self.as_it_is(width, height), None, None
        if image is not None or strength is not None:
            if neighbors is not None or "latents" in call:
                raise ValueError("neighbors and latents are for pictures from noise: leave out either them or image")
            generators = take_generators(call, count) if seeds is None else seeded_generators(seeds, len(prompts))
            starts = image_starts(image, strength, len(prompts), generators)
            for start in starts:  # as all stock pipelines but Z-Image's do
                if isinstance(start["image"], Image.Image):
                    start["image"] = self.image_processor.resize(start["image"], height, width)
            drawing = draw = self._from_image(scheduler)
        elif seeds is None:
            starts = [
                {"latents": noise} for noise in self._stock_noises(call, self._latent_shape(height, width), count)
            ]
        else:
            around = seeded_noises(self._latent_shape(height, width), seeds, neighbors, perturbation_strength)
            starts = [{"latents": self._packed(noise)} for noise in around] * len(prompts)

        outputs, own_scheduler = [], self.scheduler
        self.scheduler = scheduler
        try:
            for i, start in enumerate(starts):
                prompt, first = divmod(i, len(starts) // len(prompts))
                if first == 0:
                    self._texts = {}
                outputs.append(draw(**call, **prompts[prompt], **start))
                if drawing.interrupt:
                    break
        finally:
            self.scheduler, self._texts = own_scheduler, None
        images = join([output.images for output in outputs])
        return type(outputs[0])(images=images) if return_dict else (images,)

    def encode_prompt(self, *args: Any, **call: Any) -> Any:
        """Encode as the stock pipeline does, but once for all pictures of a prompt."""
        if self._texts is None or call.get("prompt_embeds") is not None:
            return super().encode_prompt(*args, **call)
        # Of all pictures of a prompt the image is the same, as another object in each.
        key = repr((args, {name: value for name, value in call.items() if name != "image"}))
        if key not in self._texts:
            self._texts[key] = super().encode_prompt(*args, **call)
        return self._texts[key]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Load as the stock pipeline does, and remember the settings that the adapter was trained with.

        Raises:
            ValueError: no safetensors file or several, metadata that cannot be read, or a LoRA that would not take
                effect wholly and with its own alpha. Nothing is loaded then.
        """
        source, settings = pretrained_model_name_or_path_or_dict, None
        if isinstance(source, dict):
            what, keys, header = "the adapter", [*source], {}
        else:
            source = find_file(str(source), {name: options.pop(name) for name in WHERE if name in options})
            header, keys = read_header(source)
            what, settings = f"adapter {str(source)!r}", read_settings(source, header)
        check_said(what, keys, header)
        source = self._without_texts(what, source, keys, header)
        self._check_fits(what, source)
        if settings is not None and settings.fused and not self.num_fused_loras:
            log.warning(
                f"{what} was trained on a base with {', '.join(settings.fused)} in its weights: unless this base has "
                "them, load these first, `fuse_lora(lora_scale=...)` and `unload_lora_weights()`"
            )
        name = adapter_name or get_adapter_name(self.transformer)
        super().load_lora_weights(source, adapter_name=name, hotswap=hotswap, **options)
        others = {other: kept for other, kept in self._settings.items() if other != name}
        self._settings = others if settings is None else others | {name: settings}

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: Any = None) -> None:
        """Do what the stock pipeline does; ValueError for a strength that is not finite."""
        check_strengths(adapter_weights)
        super().set_adapters(adapter_names, adapter_weights)

    def fuse_lora(self, *args: Any, lora_scale: float = 1.0, **options: Any) -> None:
        """Do what the stock pipeline does; ValueError for a strength that is not finite."""
        check_strengths(lora_scale)
        super().fuse_lora(*args, lora_scale=lora_scale, **options)

    def _without_texts(self, what: str, source: Any, keys: Sequence[str], header: dict[str, str]) -> Any:
        """Leave out, with a warning, tensors of text encoders that the stock pipeline does not adapt: T5's, say."""
        own = tuple(f"{part}." for part in self._lora_loadable_modules)
        own += ("lora_te_", "lora_te1_") if "text_encoder" in self._lora_loadable_modules else ()
        left = [key for key in keys if re.match(TEXTS, key) and not key.startswith(own)]
        if not left:
            return source
        log.warning(f"{what} adapts text encoders too, which are left out here: {len(left)} tensors, as {left[0]}")
        if "lora_adapter_metadata" in header:  # beside which diffusers reads no keys but those of its own modules
            return source
        tensors = source if isinstance(source, dict) else load_file(source)
        return {key: tensor for key, tensor in tensors.items() if key not in left}

    def _check_fits(self, what: str, source: Path | dict[str, Tensor]) -> None:
        """Raise ValueError unless every tensor of a LoRA takes effect: diffusers leaves out what a model lacks."""
        try:
            tensors = self.lora_state_dict(dict(source) if isinstance(source, dict) else source)
        except (ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{what} cannot be loaded by diffusers as it is ({error!r}); {REMEDY}") from None
        if any(re.search(r"^transformer\.transformer\.|\.alpha$", key) for key in tensors):  # taken for kohya's names
            raise ValueError(f"{what} has alpha beside its matrices, where diffusers does not read it here; {REMEDY}")
        modules = {f"transformer.{name}": module for name, module in self.transformer.named_modules()}
        mine = {key: re.split(r"\.lo(?:ra|kr)_", key) for key in tensors if key.startswith("transformer.")}
        encoders = tuple(f"{part}." for part in self._lora_loadable_modules if part != "transformer")
        lost = [key for key in tensors if key not in mine and not key.startswith(encoders) and not re.match(TEXTS, key)]
        lost += [key for key, parts in mine.items() if len(parts) != 2 or parts[0] not in modules]
        if lost:
            part = "no layer of this model" if len(lost) == len(tensors) else "this model in part"
            left = f"{len(lost)} of its {len(tensors)} tensors have no place ({', '.join(lost[:3])})"
            at_home = all(key.rpartition(".")[0] in modules for key in lost)  # its layers are here: diff, say, or LoHa
            raise ValueError(f"{what} fits {part}: {left}; {REMEDY if at_home else OTHER}")
        for key, (name, side) in mine.items():
            own = {"A.weight": "in_features", "B.weight": "out_features"}.get(side, "")
            width, wanted = tensors[key].shape[side[0] == "A"], getattr(modules[name], own, None)
            if wanted not in (None, width):
                raise ValueError(f"{what} is of another model: {name} has {own} {width} there, {wanted} here; {OTHER}")
        if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{what} has weights that are not finite, in {bad[0]}; it cannot be used")

    def _active_settings(self) -> Settings | None:
        """Settings of the first loaded of the adapters that are active, or fused into the weights; None without any."""
        names = self._settings if self.num_fused_loras else self.get_active_adapters()
        active = {name: settings for name, settings in self._settings.items() if name in names}
        if len(set(active.values())) > 1:
            first, *others = active
            log.warning(f"adapters {', '.join(others)} want other settings than {first}, loaded first, which is heard")
        return next(iter(active.values()), None)

    def _defaults(self, settings: Settings, call: dict[str, Any]) -> dict[str, Any]:
        """An adapter's settings as arguments of the stock pipeline."""
        defaults: dict[str, Any] = {
            "num_inference_steps": settings.num_steps,
            "height": settings.height,
            "width": settings.width,
            "max_sequence_length": settings.max_sequence_length,
            self.guided_by: settings.guidance_scale,
        }
        guidance = call.get(self.guided_by, settings.guidance_scale)
        if self.unguided is not None and guidance > self.unguided and "negative_prompt_embeds" not in call:
            defaults["negative_prompt"] = settings.negative_prompt
        return defaults

    def _exact_scheduler(
        self, settings: Settings | None, height: int, width: int, solver: str | None, shift: float | None
    ) -> Any:
        """Exact scheduler in place of the Euler one that models come with; any other is the user's choice and stays."""
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            if solver is not None or shift is not None:
                kind = type(self.scheduler).__name__
                raise ValueError(f"solver and shift are for a FlowMatchEulerDiscreteScheduler, got a {kind}: set it up")
            return self.scheduler
        if settings is not None:
            at_home = (height, width) == (settings.height, settings.width)
            solver = settings.solver if solver is None else solver
            shift = (settings.shift if at_home else settings.own_shift) if shift is None else shift
        solver = "dpmpp_2m" if solver is None else solver
        if solver not in SOLVER_ORDER:
            raise ValueError(f"solver must be one of {', '.join(SOLVER_ORDER)}, got {solver!r}")
        constant = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
        return self.scheduler_class.from_config(self.scheduler.config, solver_order=SOLVER_ORDER[solver], **constant)

    def _from_image(self, scheduler: Any) -> Any:
        """The stock pipeline that starts from images, of the same networks; texts are encoded by this one."""
        pipeline = self.from_image_class(**self.components | {"scheduler": scheduler})
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        pipeline.encode_prompt, pipeline.maybe_free_model_hooks = self.encode_prompt, self.maybe_free_model_hooks
        return pipeline

    def source_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels at which a pipeline that edits takes the source of what is drawn at a size."""
        return width, height

    def as_it_is(self, width: int, height: int) -> dict[str, Any]:
        """Arguments with which a stock pipeline takes a source of this size as it is, where it needs any."""
        return {}

    def _default_side(self) -> int:
        """Height and width in pixels, where neither caller nor adapter says."""
        return self.default_sample_size * self.vae_scale_factor

    def _latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape (1, C, H, W) of a picture's latents before packing."""
        channels = self.transformer.config.in_channels // (4 if self.packs_latents else 1)
        return (1, channels, height // self.vae_scale_factor, width // self.vae_scale_factor)

    def _packed(self, noise: Tensor) -> Tensor:
        """Noise in the form in which the stock pipeline takes its latents."""
        return self._pack_latents(noise, *noise.shape) if self.packs_latents else noise

    def _stock_noises(self, call: dict[str, Any], shape: tuple[int, ...], count: int) -> list[Tensor]:
        """Take `latents` or `generator` out of a call; noise of each picture, else by the global generator."""
        if "latents" in call:
            return list(as_many(call.pop("latents"), count).split(1))
        return [
            self._packed(torch.randn(shape, generator=one, device=one.device if one else None))
            for one in take_generators(call, count)
        ]


def as_many(values: Any, count: int) -> Any:
    """Return latents or generators unchanged; ValueError unless they are as many as pictures."""
    if len(values) != count:
        raise ValueError(f"latents and lists of generators must be as many as pictures, {count}, got {len(values)}")
    return values


def take_generators(call: dict[str, Any], count: int) -> list[torch.Generator | None]:
    """Take `generator` out of a call, and return one for each picture; None is the global one."""
    generator = call.pop("generator", None)
    return as_many(generator, count) if isinstance(generator, list) else [generator] * count


def as_seeds(seeds: int | Sequence[int]) -> list[int]:
    """Return one seed or many as a list, whether they are Python's numbers, NumPy's or a tensor's.

    Raises:
        ValueError: there is none, or one is no whole number that a generator takes.
    """
    try:
        try:
            numbers = [operator.index(seeds)]  # pyright: ignore[reportArgumentType]  # of many it is an error
        except TypeError:
            numbers = [operator.index(seed) for seed in seeds]  # pyright: ignore[reportGeneralTypeIssues]
    except TypeError:
        raise ValueError(f"seeds must be whole numbers, got {seeds!r}") from None
    if not numbers:
        raise ValueError("seeds must hold one seed at least, got none")
    if wrong := [number for number in numbers if not -(2**63) <= number < 2**64]:
        raise ValueError(f"seeds must be from -2**63 to 2**64 - 1, got {wrong[0]}")
    return numbers


def seeded_generators(seeds: int | Sequence[int], prompts: int) -> list[torch.Generator | None]:
    """Make a generator for each prompt and seed, prompt-major, on the CPU; ValueError as `as_seeds`."""
    numbers = as_seeds(seeds)
    return [torch.Generator().manual_seed(seed) for _ in range(prompts) for seed in numbers]


def image_starts(
    image: Any, strength: float | None, prompts: int, generators: Sequence[torch.Generator | None]
) -> list[dict[str, Any]]:
    """Make the arguments of the stock image-to-image pipeline for each picture, prompt-major.

    Raises:
        ValueError: no image, not as many as prompts, or a strength outside (0, 1].
    """
    if image is None or strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1] and needs image, got {strength} and {type(image).__name__}")
    if isinstance(image, Tensor | np.ndarray) and image.ndim == 4:
        image = [image[i : i + 1] for i in range(len(image))]
    images = image if isinstance(image, list) else [image]
    if len(images) not in (1, prompts):
        raise ValueError(f"image must be one or as many as there are prompts, {prompts}, got {len(images)}")
    images = images if len(images) == prompts else images * prompts
    own = {} if strength is None else {"strength": strength}
    return [{"image": images[i * prompts // len(generators)], "generator": g, **own} for i, g in enumerate(generators)]


def is_text(value: Any) -> bool:
    """Whether a value is a prompt, or a list of prompts."""
    return isinstance(value, str) or isinstance(value, list) and all(isinstance(one, str) for one in value)


def first_picture(image: Any) -> Image.Image:
    """Return the first of the pictures to edit as people see it; ValueError where there is none, or it is not PIL's."""
    first = image[0] if isinstance(image, list) and image else image
    if not isinstance(first, Image.Image):
        raise ValueError(f"image must be the picture to edit, or a list of them, of PIL, got {type(first).__name__}")
    return as_seen(first)


def as_seen(picture: Image.Image) -> Image.Image:
    """Return a picture as the trainer reads one: upright, in 8-bit RGB, on white.

    Raises:
        ValueError: it has 32-bit or floating-point pixels, which do not say what is white.
    """
    if picture.mode in ("I", "F"):
        raise ValueError(f"image must have 8 or 16 bits a channel, got 32-bit pixels (mode {picture.mode})")
    image = ImageOps.exif_transpose(picture)
    if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def edit_sources(image: Any, strength: float | None, prompts: int, width: int, height: int) -> list[Image.Image]:
    """Make the picture that each prompt edits, at the size that is drawn, as the trainer does.

    Raises:
        ValueError: as `first_picture`, not as many as prompts, or there is a strength, of which an edit knows none.
    """
    if strength is not None:
        raise ValueError(f"strength is for pictures to start from, and this model edits: leave it out, got {strength}")
    images = image if isinstance(image, list) else [image]
    if len(images) not in (1, prompts):
        raise ValueError(f"image must be one or as many as there are prompts, {prompts}, got {len(images)}")
    fitted = [ImageOps.fit(first_picture(one), (width, height), Image.Resampling.LANCZOS) for one in images]
    return fitted if len(fitted) == prompts else fitted * prompts


def split_prompts(call: dict[str, Any]) -> list[dict[str, Any]]:
    """Take the arguments that belong to single prompts out of a call, and return those of each prompt.

    Raises:
        ValueError: not as many of one argument as there are prompts.
    """
    of_prompts = {name: call.pop(name) for name in [*call] if "prompt" in name}
    count = prompt_count(of_prompts)
    for name, value in of_prompts.items():
        if not count or not isinstance(value, str) and len(value) != count:
            raise ValueError(f"{name} must be one value or as many as there are prompts, {count}, got {len(value)}")
    return [{name: row(value, i) for name, value in of_prompts.items()} for i in range(count)]


def prompt_count(call: dict[str, Any]) -> int:
    """How many prompts there are among the arguments of a call."""
    main = call.get("prompt", call.get("prompt_embeds", ""))
    return 1 if isinstance(main, str) else len(main)


def row(value: Any, i: int) -> Any:
    """The part of an argument for prompt i; of texts a string, never a list of one, which Z-Image writes into."""
    if isinstance(value, str):
        return value
    return value[i] if isinstance(value[i], str) else value[i : i + 1]


def seeded_noises(
    shape: tuple[int, ...], seeds: int | Sequence[int], neighbors: int | None, perturbation_strength: float | None
) -> list[Tensor]:
    """The noise of each seed, or the noises of the G neighbours around it (Eq. 7), float32 from the CPU.

    Raises:
        ValueError: as `as_seeds`, fewer than one neighbour, or a radius outside (0, 1].
    """
    numbers = as_seeds(seeds)
    if neighbors is None:
        return [gaussian_noise(shape, seed) for seed in numbers]
    if neighbors < 1 or perturbation_strength is None or not 0 < perturbation_strength <= 1:
        raise ValueError(
            "neighbors must be at least 1 and perturbation_strength in (0, 1], "
            f"got {neighbors} and {perturbation_strength}"
        )
    noises = []
    for seed in numbers:
        base = math.sqrt(1 - perturbation_strength**2) * gaussian_noise(shape, derive_seed(seed, "base"))
        deltas = (gaussian_noise(shape, derive_seed(seed, "delta", i)) for i in range(neighbors))
        noises += [base + perturbation_strength * delta for delta in deltas]
    return noises


def gaussian_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float32 noise from a generator of its own on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def derive_seed(*labels: object) -> int:
    """A 63-bit seed from labels, the same as the trainer's (SHA-256)."""
    digest = hashlib.sha256("\x1f".join(map(str, labels)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def join(parts: list[Any]) -> Any:
    """Join the pictures of several calls, whatever their output type."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [image for part in parts for image in part]


def find_file(source: str, where: dict[str, Any]) -> Path:
    """Find the file that `load_lora_weights` is given: a safetensors file, or that of a folder or Hub repository.

    Raises:
        ValueError: there is none, or there are several, or another kind of file is asked for.
    """
    path, name = Path(source), where.pop("weight_name", None)
    suffix = Path(name or source).suffix
    if suffix in PICKLES or suffix != ".safetensors" and (path.is_file() or name is not None):
        raise ValueError(f"adapters must be .safetensors files, got {name or source!r}: pickles can run code")
    if path.is_file():
        return path
    if path.suffix == ".safetensors":
        raise ValueError(f"adapter {source!r} does not exist")
    if path.is_dir():
        folder = path / (where.get("subfolder") or "")
        return folder / (name or the_adapter(source, [file.name for file in folder.glob("*")]))
    try:
        return Path(hf_hub_download(source, name or FILE_NAME, **where))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        if name is not None:
            raise
    folder = f"{where['subfolder']}/" if where.get("subfolder") else ""
    siblings = model_info(source, revision=where.get("revision"), token=where.get("token")).siblings or []
    inside = [file.rfilename.removeprefix(folder) for file in siblings if file.rfilename.startswith(folder)]
    return Path(hf_hub_download(source, the_adapter(source, [name for name in inside if "/" not in name]), **where))


def the_adapter(source: str, files: list[str]) -> str:
    """Choose a folder's adapter: the file that is named as adapters are, or the only safetensors file.

    Raises:
        ValueError: there is none, or there are several.
    """
    names = sorted(file for file in files if file.endswith(".safetensors"))
    if not names and (pickles := sorted(file for file in files if file.endswith(PICKLES))):
        raise ValueError(f"{source!r} must hold a .safetensors file, got {pickles[0]}: pickles can run code")
    if FILE_NAME in names:
        return FILE_NAME
    if len(names) != 1:
        raise ValueError(f"{source!r} must hold one adapter, got {', '.join(names) or 'none'}; choose with weight_name")
    return names[0]


def check_strengths(strengths: Any) -> None:
    """Raise ValueError for a strength that is not finite, among numbers, None, and lists and dictionaries of them."""
    if isinstance(strengths, dict | list):
        for one in strengths.values() if isinstance(strengths, dict) else strengths:
            check_strengths(one)
    elif strengths is not None and not math.isfinite(strengths):
        raise ValueError(f"strengths of adapters must be finite, got {strengths}")


def read_header(path: Path) -> tuple[dict[str, str], list[str]]:
    """Read the metadata and the tensors' names of a safetensors file.

    Raises:
        ValueError: the file is not one.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, [*file.keys()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"adapter {str(path)!r} is no readable safetensors file ({error}); get it again") from None


def check_said(what: str, keys: Sequence[str], header: dict[str, str]) -> None:
    """Raise ValueError for what diffusers would leave out in silence, DoRA's scales, and for alpha that is said twice.

    Args:
        keys: of the file's tensors, as they are there.
        header: the file's metadata.
    """
    in_header, beside = "lora_adapter_metadata" in header, any(key.endswith(".alpha") for key in keys)
    if any("dora_scale" in key for key in keys):
        raise ValueError(f"{what} is a DoRA in words that diffusers does not read, and draws without; {REMEDY}")
    if in_header and beside:
        raise ValueError(f"{what} says its alpha twice, in its header and beside its matrices; {REMEDY}")


def read_settings(path: Path, header: dict[str, str]) -> Settings | None:
    """Read the settings in an adapter's header; None where it is another trainer's and has none.

    Raises:
        ValueError: what it says cannot be understood.
    """
    if "ngrpo" not in header:
        return None
    try:
        own = json.loads(header["ngrpo"])
        model, rollout, run = own["model"], own["rollout"], own.get("config", {})  # of merged adapters none
        return Settings(
            num_steps=rollout["num_steps"],
            solver=rollout["solver"],
            shift=rollout["shift"],
            own_shift=run.get("rollout", {}).get("shift"),
            guidance_scale=model["guidance_scale"],
            negative_prompt=model["negative_prompt"],
            max_sequence_length=model["max_sequence_length"],
            height=model["height_px"],
            width=model["width_px"],
            perturbation_strength=run.get("algorithm", {}).get("perturbation_strength"),
            fused=tuple(f"{file} at {strength:g}" for file, strength in model.get("fuse", {}).items()),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"adapter {str(path)!r} has ngrpo metadata that this pipeline cannot read ({error!r}); "
            "get the pipeline of the version that it was exported with"
        ) from None
