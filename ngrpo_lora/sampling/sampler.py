"""Draws images with the deterministic solver: for evaluation, for `ngrpo sample`, and for scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.fusing import load_fused
from ngrpo_lora.adapters.header import AdapterInfo
from ngrpo_lora.adapters.loading import load_adapter
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.equations.solvers import SOLVERS
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import family_class
from ngrpo_lora.prompts.checking import warn_of_cropping
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.sampling import settings
from ngrpo_lora.types import TextEmbeds


@torch.no_grad()
def draw(
    family: BaseFamily,
    text: TextEmbeds,
    seeds: Sequence[int],
    solver: str,
    sigmas: Tensor,
    progress: Callable[[], None] = lambda: None,
    batch_size: int = 1,
    see: Callable[[Tensor], None] = lambda latents: None,
) -> list[Image.Image]:
    """Draw one image (of a video model `num_frames`) per row of `text`, by default each row alone in its batch.

    Kernels round differently for different batch sizes, so only a batch of one makes an image a function of weights,
    prompt, seed and settings, to the bit.

    Args:
        progress: called when a batch is drawn.
        see: called with the clean latents (B, ...) of each batch.
    """
    images = []
    for start in range(0, len(seeds), batch_size):
        rows = range(start, min(start + batch_size, len(seeds)))
        noise = torch.cat([gaussian_noise((1, *family.latent_shape), seeds[row]) for row in rows])
        latents = solve(family, text[[*rows]], noise, solver, sigmas)
        see(latents)
        images += family.decode(latents)
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
    """Solve from noise (B, ...) to clean latents (B, ...); `before_step` is called before each of the K steps."""

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        before_step()
        return family.velocity(latents, sigma, text)

    return SOLVERS[solver](velocity, noise.to(family.device), sigmas)[-1]


class Sampler:
    """A model, with an adapter or without, that draws as its settings say."""

    def __init__(self, info: AdapterInfo, adapter: str | Path | None = None, strength: float = 1.0):
        self.family = load_fused(info.model)
        self.names: dict[Path, str] = {}  # of the adapters that are on the model, active or not
        self.configure(info)
        if adapter is not None:
            self.use([(Path(adapter), strength)])

    def configure(self, info: AdapterInfo) -> None:
        """Draw with these settings from now on; the model stays as it was loaded."""
        self.info, self.solver = info, info.rollout.solver
        self.sigmas = self.family.sigmas(info.rollout.num_steps, info.rollout.shift)

    def with_settings(self, info: AdapterInfo) -> Sampler:
        """A view of this sampler with other settings; the model and its adapters are shared.

        Raises:
            UserError: the model cannot draw so.
        """
        other = copy(self)
        other.family = self.family.with_settings(info.model)
        other.configure(info)
        return other

    def editing(self, prompts: Sequence[Prompt]) -> Sampler:
        """A view of this sampler that edits, where a prompt has a source and the model does both; else this sampler.

        Raises:
            UserError: the model takes no source of the size that it draws.
        """
        info = settings.editing(self.info, prompts)
        if info is self.info:
            return self
        other = copy(self)
        other.family = self.family.seen_as(family_class(info.model, self.family.pipeline_class))
        other.configure(info)
        return other

    def following(self, prompt: Prompt) -> Sampler:
        """A view of this sampler that draws at the size that suits the prompt's source; without one, this sampler.

        Raises:
            ConfigError: the source cannot be read.
        """
        if prompt.source is None or not self.family.edits:
            return self
        source = prompt.source.load()
        height, width = self.family.edited_size(source)
        warn_of_cropping("the size of a drawing", {prompt.source: source.size}, (width, height))
        model = self.info.model.model_copy(update={"height_px": height, "width_px": width})
        return self.with_settings(AdapterInfo(model, self.info.rollout))

    def use(self, adapters: Sequence[tuple[Path, float]]) -> None:
        """Draw with these LoRA files together, each at its strength, from now on; with none, the base itself.

        Raises:
            UserError: as `adapters.loading.load_adapter`.
        """
        strengths: dict[str, float] = {}
        for path, strength in adapters:
            if path not in self.names:
                name = f"adapter_{len(self.names)}"
                load_adapter(self.family, path, strength, name)
                self.names[path] = name
            strengths[self.names[path]] = strengths.get(self.names[path], 0.0) + strength
        for transformer in self.family.transformers:
            lora.switch(transformer, bool(strengths))
        if strengths:
            self.family.use_loras([*strengths], [*strengths.values()])

    def remove_adapters(self) -> None:
        """Take all LoRA files off the model, so that their memory is free and changed files are read again."""
        if self.names:
            self.family.unload_loras()
            self.names.clear()

    def __call__(self, prompts: Sequence[str | Prompt], seeds: Sequence[int]) -> Iterator[Image.Image]:
        """Draw one image (of a video model `num_frames`) per prompt and its seed, each when it is asked for."""
        for prompt, rows in groupby(zip(prompts, seeds, strict=True), itemgetter(0)):
            text = self.family.encode([prompt])
            for _, seed in rows:
                yield from draw(self.family, text, [seed], self.solver, self.sigmas)


def sample_images(
    adapter: str | Path | None,
    model: str | None,
    prompts: Sequence[str | Prompt],
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
    sampler = Sampler(settings.drawing_settings(adapter, model), adapter, strength)
    return list(sampler([prompt for prompt in prompts for _ in seeds], [*seeds] * len(prompts)))
