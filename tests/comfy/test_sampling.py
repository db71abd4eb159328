"""ComfyUI's own sampling path with our sampler draws what the trainer draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adapters import rounded_latents, trainer_latents
from comfy_client import Comfy, Refused
from graphs import drawing, latents_of, node
from rounding import relative_error
from torch import Tensor

from ngrpo_lora.algorithms.neighbor import Algorithm, Config
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family


@pytest.fixture(scope="module")
def family() -> BaseFamily:
    return load_family(ModelConfig(device="cpu"))


def as_model_has_them(family: BaseFamily, latents: Tensor) -> Tensor:
    return latents * family.vae.config.scaling_factor


def noise_of(family: BaseFamily) -> Tensor:
    return gaussian_noise((1, *family.latent_shape), 7)


@pytest.mark.parametrize(("steps", "solver"), [(4, "dpmpp_2m"), (8, "dpmpp_2m"), (20, "dpmpp_2m"), (8, "euler")])
def test_latents_are_the_trainers(comfy: Comfy, family: BaseFamily, steps: int, solver: str):
    drawn = latents_of(comfy, comfy.run(drawing(seed=7, steps=steps, solver=solver)))
    expected, rounding = rounded_latents(family, noise=noise_of(family), steps=steps, solver=solver)
    assert relative_error(as_model_has_them(family, drawn), expected) <= rounding


def test_comfyuis_own_dpmpp_2m_lands_elsewhere(comfy: Comfy, family: BaseFamily):
    graph = drawing(seed=7) | {"sampler": node("KSamplerSelect", sampler_name="dpmpp_2m")}
    drawn = as_model_has_them(family, latents_of(comfy, comfy.run(graph)))
    expected, rounding = rounded_latents(family, noise=noise_of(family))
    assert relative_error(drawn, expected) > max(1e-3, 100 * rounding)


def test_pictures_are_the_trainers_to_the_bit(comfy: Comfy, family: BaseFamily):
    result = comfy.run(drawing(seed=7))
    shown = comfy.image(result.outputs["show"]["images"][0])
    (expected,) = family.decode(trainer_latents(family, noise=noise_of(family)))
    assert np.abs(np.asarray(shown, int) - np.asarray(expected, int)).max() <= 1
    assert np.mean(np.asarray(shown) == np.asarray(expected)) > 0.999


def test_a_batch_of_neighbours_is_the_trainers_group(comfy: Comfy, family: BaseFamily):
    noise = node("NGRPO_NeighborNoise", noise_seed=5, perturbation_strength=0.3, member=0, around="a trainer's group")
    drawn = latents_of(comfy, comfy.run(drawing(batch=3) | {"noise": noise}))
    rollout = RolloutConfig(num_steps=8, group_size=3)
    algorithm = Algorithm(Config(num_anchors=1), rollout)
    group = algorithm.neighborhood(family.latent_shape, 5)
    expected, rounding = rounded_latents(family, noise=group)
    assert relative_error(as_model_has_them(family, drawn), expected) <= rounding


def test_the_middle_and_its_neighbours(comfy: Comfy):
    def drawn(member: int, radius: float) -> Tensor:
        noise = node(
            "NGRPO_NeighborNoise",
            noise_seed=7,
            perturbation_strength=radius,
            member=member,
            around="this seed's picture",
        )
        return latents_of(comfy, comfy.run(drawing() | {"noise": noise}))

    middle = latents_of(comfy, comfy.run(drawing(seed=7)))
    torch.testing.assert_close(drawn(-1, 0.3), middle, rtol=0, atol=0)
    near, far = (relative_error(drawn(0, radius), middle) for radius in (0.05, 0.9))
    assert 0 < near < far


@pytest.mark.parametrize(
    ("name", "wrong", "reason"),
    [
        ("sampler", node("NGRPO_FlowSampler", solver="dpmpp_3m"), "solver must be one of"),
        ("noise", node("NGRPO_NeighborNoise", noise_seed=7, around="it"), "around must be one of"),
    ],
)
def test_what_is_in_no_list_is_refused(comfy: Comfy, name: str, wrong: dict[str, Any], reason: str):
    defaults = {"perturbation_strength": 0.3, "member": 0} if name == "noise" else {}
    with pytest.raises(Refused) as refused:
        comfy.submit(drawing() | {name: wrong | {"inputs": wrong["inputs"] | defaults}})
    assert refused.value.status == 400
    assert reason in refused.value.reasons
