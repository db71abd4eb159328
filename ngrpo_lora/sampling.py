"""Draw images with the deterministic solver: evaluation, `ngrpo sample`, and anybody's script."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ngrpo_lora import models, registry
from ngrpo_lora.adapter_file import adapter_label, read_metadata
from ngrpo_lora.adapter_report import digest
from ngrpo_lora.config import ModelConfig, RolloutConfig, RunConfig, load_config, preset_names
from ngrpo_lora.devices import resolve_device, resolve_dtype
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.export import AdapterInfo, code_version, read_adapter
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._blueprint import architectures
from ngrpo_lora.models._index import family_of, model_index
from ngrpo_lora.noise import gaussian_noise
from ngrpo_lora.pictures import read_png_text
from ngrpo_lora.prompt_files import read_prompts
from ngrpo_lora.prompts import BUILTIN_SOURCES, open_prompts
from ngrpo_lora.quantization import NEED_GPU
from ngrpo_lora.solvers import SOLVERS
from ngrpo_lora.types import TextEmbeds

OPTIONS = {
    "steps": "num_steps",
    "shift": "shift",
    "solver": "solver",
    "guidance": "guidance_scale",
    "height": "height_px",
    "width": "width_px",
}
"""Options of `ngrpo sample`, and the settings that they change."""


def load_family(config: ModelConfig, parts: Parts = "all", divided: bool = False) -> BaseFamily:
    """The model family of a configuration on its device, loaded without the libraries' notes and bars.

    Raises:
        UserError: no such model, no family for it, or it cannot be loaded.
    """
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    device = resolve_device(config.device)
    config = config.model_copy(update={"dtype": resolve_dtype(config.dtype, device)})
    return registry.load(models, family_of(config)).Family(config, device, parts, divided)


@torch.no_grad()
def draw(
    family: BaseFamily,
    text: TextEmbeds,
    seeds: Sequence[int],
    solver: str,
    sigmas: Tensor,
    progress: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """One image per row of `text`, of a video model `num_frames`, each row alone in its batch.

    Kernels round differently for different batch sizes, so only this makes an image a function of weights,
    prompt, seed and settings, to the bit.
    """
    images = []
    for row, seed in enumerate(seeds):
        noise = gaussian_noise((1, *family.latent_shape), seed)
        images += family.decode(solve(family, text[[row]], noise, solver, sigmas))
        progress()
    return images


@torch.no_grad()
def solve(
    family: BaseFamily,
    text: TextEmbeds,
    noise: Tensor,
    solver: str,
    sigmas: Tensor,
    before_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Noise (B, ...) -> clean latents (B, ...), `before_step` being called before each of the K steps."""

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        before_step()
        return family.velocity(latents, sigma, text)

    return SOLVERS[solver](velocity, noise.to(family.device), sigmas)[-1]


class Sampler:
    """A model, with an adapter or without, that draws as its settings say."""

    def __init__(self, info: AdapterInfo, adapter: str | Path | None = None, strength: float = 1.0):
        self.family = load_family(info.model)
        self.names: dict[Path, str] = {}  # of the adapters that are on the model, active or not
        self.settle(info)
        if adapter is not None:
            self.use([(Path(adapter), strength)])

    def settle(self, info: AdapterInfo) -> None:
        """Draw as these settings say from now on; what is loaded stays as it is loaded."""
        self.info, self.solver = info, info.rollout.solver
        self.sigmas = self.family.sigmas(info.rollout.num_steps, info.rollout.shift)

    def at(self, info: AdapterInfo) -> Sampler:
        """The same loaded model, with the same adapters, at other settings.

        Raises:
            UserError: the model cannot draw so.
        """
        other = copy(self)
        other.family = self.family.at(info.model)
        other.settle(info)
        return other

    def use(self, adapters: Sequence[tuple[Path, float]]) -> None:
        """Draw with these LoRA files together, each at its strength, from now on; with none, the base itself.

        Raises:
            UserError: as `BaseFamily.load_adapter`.
        """
        strengths: dict[str, float] = {}
        for path, strength in adapters:
            if path not in self.names:
                name = f"adapter_{len(self.names)}"
                self.family.load_adapter(str(path), strength, name)
                self.names[path] = name
            strengths[self.names[path]] = strengths.get(self.names[path], 0.0) + strength
        if strengths:
            self.family.transformer.enable_adapters()
            self.family.pipeline.set_adapters([*strengths], [*strengths.values()])
        elif self.names:
            self.family.transformer.disable_adapters()

    def remove_adapters(self) -> None:
        """Take all LoRA files off the model, so that their memory is free and changed files are read again."""
        if self.names:
            self.family.pipeline.unload_lora_weights()
            self.names.clear()

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image.Image]:
        """One image per prompt and seed, of a video model `num_frames`, drawn when they are asked for."""
        for prompt, rows in groupby(zip(prompts, seeds, strict=True), itemgetter(0)):
            text = self.family.encode([prompt])
            for _, seed in rows:
                yield from draw(self.family, text, [seed], self.solver, self.sigmas)


def drawing_settings(adapter: str | Path | None, model: str | None, device: str = "auto") -> AdapterInfo:
    """What an adapter was trained with, or the defaults; `model` replaces the base that it names.

    Raises:
        UserError: not an adapter.
    """
    info = read_adapter(adapter) if adapter is not None else AdapterInfo(ModelConfig(), RolloutConfig())
    return on_this_machine(info, model, device)


def own_settings(path: str, adapter: Path | None = None) -> AdapterInfo:
    """How a model is drawn: as the adapter says, else as its preset trains it, else as a preset of its family.

    Only size, frames, steps and negative prompt are a preset's; shift and guidance are the model's own. A model
    without a preset has the defaults, but 1024 x 1024 pixels.

    Raises:
        UserError: no such model, or not an adapter.
    """
    if adapter is not None and "ngrpo" in read_metadata(adapter):
        info = read_adapter(adapter)
        return AdapterInfo(info.model.model_copy(update={"path": path}), info.rollout)
    if path == "embedded":
        return AdapterInfo(ModelConfig(), RolloutConfig())
    presets, known = preset_by_model(), architectures()
    found = presets.get(path)
    if found is None:
        pipeline = known[path]["pipeline"] if path in known else model_index(path)["_class_name"]
        alike = (run for model, run in presets.items() if known.get(model, {}).get("pipeline") == pipeline)
        found = next(alike, None)
    if found is None:
        return AdapterInfo(ModelConfig(path=path, height_px=1024, width_px=1024), RolloutConfig())
    kept = found.model.model_dump(include={"height_px", "width_px", "num_frames", "negative_prompt"})
    return AdapterInfo(ModelConfig(path=path, **kept), RolloutConfig(num_steps=found.rollout.num_steps))


@cache
def preset_by_model() -> dict[str, RunConfig]:
    """The shipped presets by `model.path`, the first of each."""
    runs: dict[str, RunConfig] = {}
    for name in preset_names():
        run = load_config(name)
        runs.setdefault(run.model.path, run)
    return runs


def on_this_machine(info: AdapterInfo, model: str | None, device: str = "auto") -> AdapterInfo:
    """Settings of elsewhere with the device of here; `model` replaces the base that they name."""
    config = info.model.model_copy(update={"device": device} | ({"path": model} if model else {}))
    if config.quantization in NEED_GPU and not resolve_device(device).startswith("cuda"):
        config = config.model_copy(update={"quantization": "none"})  # pictures differ by its rounding
    return AdapterInfo(config, info.rollout)


def sample_images(
    adapter: str | Path | None,
    model: str | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    strength: float = 1.0,
) -> list[Image.Image]:
    """Draw every prompt with every seed (prompt-major), with the settings that the adapter was trained with.

    A video model gives all frames of each, one after the other.

    Args:
        adapter: LoRA file; None draws with the base model.
        model: `embedded`, a diffusers folder or a Hub id; None: the base that the adapter names.
        strength: scale of the adapter; 0 is the base model.
    Raises:
        UserError: no such model, or a file that is no adapter, or fits no layer of the model.
    """
    sampler = Sampler(drawing_settings(adapter, model), adapter, strength)
    return list(sampler([prompt for prompt in prompts for _ in seeds], [*seeds] * len(prompts)))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that say how they were drawn


@dataclass(frozen=True)
class Column:
    """What draws: LoRA files with their strengths, all at once; none is the base."""

    label: str
    adapters: tuple[tuple[Path, float], ...] = ()


@dataclass(frozen=True)
class Drawing:
    """One sample, of a video all frames, and the PNG text with which `--like` draws it again."""

    column: Column
    row: int
    prompt: str
    seed: int
    frames: list[Image.Image]
    text: dict[str, str]


def columns_of(adapters: Sequence[tuple[Path, float]], apart: bool, base_too: bool) -> list[Column]:
    """The base where it is wanted, and the adapters together, or each of them apart."""
    columns = [Column("base")] if base_too or not adapters else []
    groups = [(one,) for one in adapters] if apart else [tuple(adapters)] if adapters else []
    for group in groups:
        name = "+".join(adapter_label(path) + ("" if strength == 1 else f"x{strength:g}") for path, strength in group)
        label, number = name, 2
        while label in [column.label for column in columns]:
            label, number = f"{name}-{number}", number + 1
        columns.append(Column(label, group))
    return columns


def draw_columns(
    info: AdapterInfo, columns: Sequence[Column], prompts: Sequence[str], seeds: Sequence[int]
) -> Iterator[Drawing]:
    """Every prompt with every seed (prompt-major) by every column, drawn when it is asked for.

    Raises:
        UserError: no such model, or a file that is no adapter, or fits no layer of the model.
    """
    sampler = Sampler(info)
    for column in columns:  # an adapter that does not fit should be known before an hour of drawing
        sampler.use(column.adapters)
    settings = shown_settings(info, sampler.family)
    digests = {path: digest(path) for column in columns for path, _ in column.adapters}
    for number, prompt in enumerate(prompts):
        text = sampler.family.encode([prompt])
        for seed in seeds:
            for column in columns:
                sampler.use(column.adapters)
                frames = draw(sampler.family, text, [seed], sampler.solver, sampler.sigmas)
                adapters = [
                    {"file": os.path.abspath(path), "sha256": digests[path], "strength": strength}
                    for path, strength in column.adapters
                ]
                own = {"ngrpo": json.dumps(settings | {"adapters": adapters}, sort_keys=True)}
                yield Drawing(column, number, prompt, seed, frames, {"prompt": prompt, "seed": str(seed)} | own)


def shown_settings(info: AdapterInfo, family: BaseFamily) -> dict[str, Any]:
    """All that a picture depends on beside adapters, prompt and seed, with what the model recommends written out."""
    shift = info.rollout.shift or family.shift(info.rollout.num_steps)
    rollout = {"solver": info.rollout.solver, "num_steps": info.rollout.num_steps, "shift": shift}
    model = info.model.model_copy(update=family.settings).model_dump(mode="json")
    return {"code_version": code_version(), "model": model, "rollout": rollout}


@dataclass(frozen=True)
class Recipe:
    """How a picture was drawn."""

    info: AdapterInfo
    adapters: tuple[tuple[Path, float], ...]
    prompt: str
    seed: int


def read_recipe(path: Path, same_adapters: bool = True) -> Recipe:
    """What `ngrpo sample` wrote into a picture.

    Args:
        same_adapters: the files must be there, unchanged; otherwise they are not looked at.
    Raises:
        UserError: not such a picture, or an adapter has gone or is another one now.
    """
    text = read_png_text(path)
    try:
        own = json.loads(text["ngrpo"])
        info = AdapterInfo(ModelConfig.model_validate(own["model"]), RolloutConfig.model_validate(own["rollout"]))
        adapters = [(Path(one["file"]), one["sha256"], float(one["strength"])) for one in own["adapters"]]
        prompt, seed = text["prompt"], int(text["seed"])
    except (ValidationError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--like must be a PNG file that `ngrpo sample` wrote, but {str(path)!r} is none") from None
    for file, sha256, _ in adapters if same_adapters else []:
        if not file.is_file() or digest(file) != sha256:
            what = "has changed since" if file.is_file() else "is not there any more"
            raise UserError(f"{str(path)!r} was drawn with {str(file)!r}, which {what}; give the one with --adapter")
    return Recipe(info, tuple((file, strength) for file, _, strength in adapters), prompt, seed)


def with_settings(info: AdapterInfo, changes: Mapping[str, str | float | None]) -> AdapterInfo:
    """Other settings, by the names of the command's options; None leaves one as it is.

    Raises:
        ConfigError: one line per value that is not possible.
    """
    given = {OPTIONS[option]: value for option, value in changes.items() if value is not None}
    model, rollout = (
        part.model_dump() | {key: value for key, value in given.items() if key in type(part).model_fields}
        for part in (info.model, info.rollout)
    )
    try:
        return AdapterInfo(ModelConfig.model_validate(model), RolloutConfig.model_validate(rollout))
    except ValidationError as error:
        named = {field: option for option, field in OPTIONS.items()}
        raise ConfigError(
            f"--{named[str(detail['loc'][0])]} {detail['msg'].removeprefix('Value error, ')}"
            + ("" if ", got " in detail["msg"] else f", got {detail['input']!r}")
            for detail in error.errors()
        ) from None


def listed_prompts(source: str, count: int) -> list[str]:
    """The first prompts of a source, in the order of its file.

    Raises:
        ConfigError: no such source.
    """
    try:
        if source in BUILTIN_SOURCES:
            endless = open_prompts(source, 0)
            return [endless.prompt(index).text for index in range(count)]
        return [prompt.text for prompt in read_prompts(source).prompts[:count]]
    except ConfigError as error:
        raise ConfigError(f"--prompts {error}") from None
