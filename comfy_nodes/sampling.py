"""The trainer's solver, schedule and neighbourhoods for ComfyUI's own samplers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from comfy.samplers import KSAMPLER
from comfy_api.latest import io
from torch import Tensor

from ngrpo_lora.config import parse_config
from ngrpo_lora.equations.noise import gaussian_noise, neighbor_noise
from ngrpo_lora.equations.solvers import SOLVERS, dpmpp_2m_step, pairs
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._blueprint import make_family, read_blueprint
from ngrpo_lora.models._index import architectures
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.world import MODELS

from ._api import Node, checked, listed, schema

AROUND = ["this seed's picture", "a trainer's group"]


@torch.no_grad()
def sample_flow(
    denoise: Callable[..., Tensor],
    latents: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    solver: str = "dpmpp_2m",
) -> Tensor:
    """`ngrpo_lora.equations.solvers` as a k-diffusion sampler: `denoise(latents, sigma)` predicts the clean latents.

    Args:
        latents: (B, ...) at `sigmas[0]`. sigmas: (K + 1,), decreasing within [0, 1].
    Returns:
        (B, ...) at `sigmas[K]`.
    Raises:
        ConfigError: sigmas that no flow model has.
    """
    try:
        steps = pairs(sigmas)
    except ValueError as error:
        raise ConfigError(f"{error}; Flow Sigmas and Load Adapter give such") from None
    history = None
    for step, (sigma, sigma_next) in enumerate(steps):
        levels = torch.full((len(latents),), sigma, dtype=latents.dtype, device=latents.device)
        clean = denoise(latents, levels, **(extra_args or {}))
        if callback is not None:
            callback({"x": latents, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": clean})
        latents = dpmpp_2m_step(latents, clean, sigma, sigma_next, history)
        history = (sigma, clean) if solver == "dpmpp_2m" else None  # without history a step is Euler's
    return latents


class FlowSampler(Node):
    """Node that gives the trainer's solver as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowSampler",
            display_name="Flow DPM++ Sampler",
            description="DPM-Solver++ 2M for flow models, as the trainer draws: ComfyUI's own dpmpp_2m is made for "
            "another noise schedule and lands elsewhere. For SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["dpm++", "dpm++ 2m", "dpmpp_2m", "euler", "flow matching", "sampler select"],
            inputs=[
                io.Combo.Input(
                    "solver",
                    options=[*SOLVERS],
                    default="dpmpp_2m",
                    tooltip="dpmpp_2m: second order, 8 steps are enough. euler: first order.",
                )
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def validate_inputs(cls, solver: str = "dpmpp_2m") -> bool:
        return checked(listed, "solver", solver, [*SOLVERS])

    @classmethod
    def execute(cls, solver: str) -> io.NodeOutput:
        return io.NodeOutput(KSAMPLER(sample_flow, {"solver": listed("solver", solver, [*SOLVERS])}))


@lru_cache(16)
def weightless(path: str, height_px: int, width_px: int) -> BaseFamily:
    """Make a known model at this size without its weights, for its schedule.

    Raises:
        ConfigError: pictures of no model have this size.
    """
    try:
        config = parse_config({"model": {"path": path, "height_px": height_px, "width_px": width_px}}).model
    except ConfigError as error:
        raise ConfigError(line.replace("model.", "").replace("_px", "") for line in error.problems) from None
    return make_family(read_blueprint(config), config)


class FlowSigmas(Node):
    """Node that gives the trainer's noise levels as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowSigmas",
            display_name="Flow Sigmas",
            description="The noise levels of a model as diffusers and the trainer have them, from exactly 1 to exactly "
            "0. Many models shift them by the picture's size.",
            search_aliases=["basic scheduler", "flow matching", "noise levels", "scheduler", "timesteps"],
            advanced=["shift", "denoise"],
            inputs=[
                io.Combo.Input(
                    "base",
                    options=[*MODELS, *architectures()],
                    default="black-forest-labs/FLUX.1-dev",
                    tooltip="The model whose schedule this is, by its name on the Hub; nothing is downloaded.",
                ),
                io.Int.Input("steps", default=8, min=1, max=1000, tooltip="Solver steps: one more level than this."),
                io.Int.Input("width", default=1024, min=16, max=16384, step=16, tooltip="Of the picture, in pixels."),
                io.Int.Input("height", default=1024, min=16, max=16384, step=16, tooltip="Of the picture, in pixels."),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    round=False,
                    tooltip="0: the model's own; otherwise this, whatever the size.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1: only the last steps of a longer schedule, to go on from a picture.",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def validate_inputs(cls, base: str = "embedded") -> bool:
        return checked(listed, "base", base, [*MODELS, *architectures()])

    @classmethod
    def execute(cls, base: str, steps: int, width: int, height: int, shift: float, denoise: float) -> io.NodeOutput:
        family = weightless(listed("base", base, [*MODELS, *architectures()]), height, width)
        return io.NodeOutput(family.sigmas(int(steps / denoise), shift or None)[-(steps + 1) :])


class Neighborhood:
    """NOISE: row k of a batch is member `first + k` of a seed's neighbourhood (Eq. 7)."""

    def __init__(self, seed: int, perturbation_strength: float, first: int, around: str):
        self.seed, self.radius, self.first = seed, perturbation_strength, first
        self.base_seed = seed if around == AROUND[0] else derive_seed(seed, "base")

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Noise (B, ...) in the latents' shape, one member for each row."""
        _, *shape = latent["samples"].shape
        base = gaussian_noise(shape, self.base_seed)
        rows = latent.get("batch_index") or range(len(latent["samples"]))
        return torch.stack([self.member(base, self.first + row) for row in rows])

    def member(self, base: Tensor, index: int) -> Tensor:
        """Noise of neighbour `index`, or `base` itself, the middle, for -1."""
        if index < 0:
            return base
        delta = gaussian_noise(base.shape, derive_seed(self.seed, "delta", index))
        return neighbor_noise(base, delta[None], self.radius)[0]


class NeighborNoise(Node):
    """Node that gives a seed's neighbourhood as NOISE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "NeighborNoise",
            display_name="Neighbor Noise",
            description="One seed's noise and its neighbours, as Neighbor GRPO perturbs it. A batch of G latents gets "
            "G neighbours: pictures that are alike, and more so the smaller the radius.",
            search_aliases=["neighbour", "perturbation", "random noise", "seed variation", "subseed"],
            advanced=["around"],
            inputs=[
                io.Int.Input(
                    "noise_seed", default=0, min=0, max=2**63 - 1, control_after_generate=True, tooltip="The middle."
                ),
                io.Float.Input(
                    "perturbation_strength",
                    default=0.3,
                    min=0.001,
                    max=1.0,
                    step=0.01,
                    round=False,
                    tooltip="Radius: 0.3 as the paper trains; at 1 nothing of the seed is left.",
                ),
                io.Int.Input(
                    "member",
                    default=0,
                    min=-1,
                    max=4095,
                    tooltip="The first row's neighbour; the next rows have the next. -1: the first row is the middle.",
                ),
                io.Combo.Input(
                    "around",
                    options=AROUND,
                    default=AROUND[0],
                    tooltip="The picture that RandomNoise draws with this seed, or the group that the trainer draws.",
                ),
            ],
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def validate_inputs(cls, around: str = AROUND[0]) -> bool:
        return checked(listed, "around", around, AROUND)

    @classmethod
    def execute(cls, noise_seed: int, perturbation_strength: float, member: int, around: str) -> io.NodeOutput:
        listed("around", around, AROUND)
        return io.NodeOutput(Neighborhood(noise_seed, perturbation_strength, member, around))


NODES: list[type[io.ComfyNode]] = [FlowSampler, FlowSigmas, NeighborNoise]
