"""The bound on rounding lets through what only rounds otherwise, and nothing that computes otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rounding import relative_error, with_rounding
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.equations.solvers import SOLVERS
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.types import TextEmbeds


def exact(sigma: float) -> float:
    return sigma


@torch.no_grad()
def drawn(
    family: BaseFamily, rows: int = 1, solver: str = "dpmpp_2m", told: Callable[[float], float] = exact
) -> Tensor:
    """Latents (1, ...) of seed 7, drawn in a batch of equal rows; `told` is the noise level that the model hears of."""
    text = family.encode(["a star above a heart"] * rows)
    text = TextEmbeds({name: tensor.to(family.dtype) for name, tensor in text.tensors.items()})
    noise = gaussian_noise((1, *family.latent_shape), 7).repeat(rows, 1, 1, 1)
    return SOLVERS[solver](lambda x, sigma: family.velocity(x, told(sigma), text), noise, family.sigmas(8))[-1][:1]


@pytest.mark.parametrize("size_px", [64, 96])
def test_what_rounds_otherwise_is_within_the_bound_and_what_computes_otherwise_is_far_outside(size_px: int):
    family = load_family(ModelConfig(device="cpu", dtype="float32", height_px=size_px, width_px=size_px))
    expected, rounding = with_rounding(family.transformer, lambda: drawn(family))
    assert torch.equal(drawn(family), expected)  # the weights are as they were
    assert 0 < relative_error(drawn(family, rows=4), expected) <= rounding

    for fault in (
        drawn(family, solver="euler"),
        drawn(family, told=lambda sigma: int(1000 * sigma) / 1000),
        drawn(family, told=lambda sigma: sigma + 1e-4),
    ):
        assert relative_error(fault, expected) > 10 * rounding

    family.transformer.double()
    family.dtype = torch.float64
    assert 0 < relative_error(drawn(family), expected) <= rounding
