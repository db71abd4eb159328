"""Draw images with the deterministic solver: evaluation, `ngrpo sample`, and anybody's script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ngrpo_lora import models, registry
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.devices import resolve_device, resolve_dtype
from ngrpo_lora.export import AdapterInfo, read_adapter
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._index import family_of
from ngrpo_lora.noise import gaussian_noise
from ngrpo_lora.quantization import NEED_GPU
from ngrpo_lora.solvers import SOLVERS
from ngrpo_lora.types import TextEmbeds


def load_family(config: ModelConfig, parts: Parts = "all") -> BaseFamily:
    """The model family of a configuration on its device, loaded without the libraries' notes and bars.

    Raises:
        UserError: no such model, no family for it, or it cannot be loaded.
    """
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    device = resolve_device(config.device)
    config = config.model_copy(update={"dtype": resolve_dtype(config.dtype, device)})
    return registry.load(models, family_of(config)).Family(config, device, parts)


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
        one = text[[row]]
        noise = gaussian_noise((1, *family.latent_shape), seed).to(family.device)
        latents = SOLVERS[solver](lambda x, sigma, one=one: family.velocity(x, sigma, one), noise, sigmas)[-1]
        images += family.decode(latents)
        progress()
    return images


class Sampler:
    """A model, with an adapter or without, that draws as its settings say."""

    def __init__(self, info: AdapterInfo, adapter: str | Path | None = None, strength: float = 1.0):
        self.family, self.solver = load_family(info.model), info.rollout.solver
        if adapter is not None:
            self.family.load_adapter(str(adapter), strength)
        self.sigmas = self.family.sigmas(info.rollout.num_steps, info.rollout.shift)

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
