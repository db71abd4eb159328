"""LoRA files for tests, of the embedded model, with an effect that shows; and the pictures that the trainer draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_client import Comfy
from graphs import PROMPT
from rounding import with_rounding
from torch import Tensor, nn

from ngrpo_lora.adapters.reading import Layer
from ngrpo_lora.adapters.writing import save_tensors, state_dict
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.equations.solvers import SOLVERS
from ngrpo_lora.models._base import BaseFamily


def loras_folder(comfy: Comfy) -> Path:
    """Where the server looks for LoRA files."""
    folder = Path(comfy.base) / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def random_layers(family: BaseFamily, seed: int = 0, rank: int = 4, size: float = 1.0) -> dict[str, Layer]:
    """Of every linear layer of every block."""
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for name, module in family.transformer.named_modules():
        if "blocks." in name and isinstance(module, nn.Linear) and "norm" not in name:
            down = torch.randn(rank, module.in_features, generator=draw) / module.in_features**0.5
            up = torch.randn(module.out_features, rank, generator=draw) / module.out_features**0.5
            layers[name] = Layer(down, size * up)
    return layers


def save_adapter(path: Path, layers: dict[str, Layer], header: dict[str, str]) -> Path:
    """As the trainer writes it."""
    save_tensors(path, state_dict(layers), header)
    return path


SEED = 3


@torch.no_grad()
def trainer_latents(
    family: BaseFamily,
    adapters: Sequence[tuple[dict[str, Layer], Callable[[int], float]]] = (),
    noise: Tensor | None = None,
    steps: int = 8,
    solver: str = "dpmpp_2m",
    shift: float | None = None,
) -> Tensor:
    """The clean latents (B, ...) with adapters added into the weights, each at its strength for every step.

    Noise is that of SEED where none is given.
    """
    noise = gaussian_noise((1, *family.latent_shape), SEED) if noise is None else noise
    sigmas = family.sigmas(steps, shift)
    text = family.encode([PROMPT] * len(noise))
    kept = {name: weight.clone() for name, weight in family.transformer.state_dict().items()}

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        family.transformer.load_state_dict(kept)
        for layers, strength in adapters:
            for name, layer in layers.items():
                family.transformer.get_submodule(name).weight += strength(sigmas.tolist().index(sigma)) * layer.delta()
        return family.velocity(latents, sigma, text)

    latents = SOLVERS[solver](velocity, noise, sigmas)[-1]
    family.transformer.load_state_dict(kept)
    return latents


def rounded_latents(family: BaseFamily, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
    """`trainer_latents`, and the relative error that rounding explains."""
    return with_rounding(family.transformer, lambda: trainer_latents(family, *args, **kwargs))
