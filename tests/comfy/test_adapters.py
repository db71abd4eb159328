"""Load Adapter: what it draws is what the trainer draws with the file, and nothing that does not fit gets through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import SEED, loras_folder, random_layers, save_adapter, trainer_latents
from comfy_client import Comfy, Graph, Refused
from graphs import drawing, latents_of, node
from torch import Tensor

from ngrpo_lora.adapter_file import Layer
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.export import describe_adapter
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.sampling import load_family


@pytest.fixture(scope="module")
def family() -> BaseFamily:
    return load_family(ModelConfig(device="cpu"))


@pytest.fixture(scope="module")
def layers(family: BaseFamily) -> dict[str, dict[str, Layer]]:
    """Of two adapters."""
    return {name: random_layers(family, seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def loras(comfy: Comfy, family: BaseFamily, layers: Any, make_config: Any, tmp_path_factory: Any) -> Path:
    """The server's folder, with these adapters as a run of six steps writes them."""
    folder = loras_folder(comfy)
    config = make_config(tmp_path_factory.mktemp("run"), "rollout.num_steps=6", "rollout.shift=2.5")
    for name, own in layers.items():
        header = describe_adapter(sorted(f"transformer.{layer}.lora_A.weight" for layer in own), family, config)
        save_adapter(folder / f"{name}.safetensors", own, header)
    return folder


def adapted(name: str = "a", model: Any = ("model", 0), **settings: Any) -> dict[str, Any]:
    given = {"lora_name": f"{name}.safetensors", "strength": 1.0, "schedule": "", "alpha": "fold in"}
    return node("NGRPO_LoadAdapter", model=[*model], **given | settings)


def drawing_with(load: dict[str, Any], **settings: Any) -> Graph:
    graph = drawing(**{"seed": SEED} | settings) | {"load": load}
    graph["guider"]["inputs"]["model"] = ["load", 0]
    return graph


def model_latents(comfy: Comfy, family: BaseFamily, graph: Graph) -> Tensor:
    return latents_of(comfy, comfy.run(graph)) * family.vae.config.scaling_factor


def check_same(drawn: Tensor, expected: Tensor, base: Tensor, tolerance: float = 1e-6) -> None:
    """Latents are equal, and far from those of the base."""
    assert ((expected - base).norm() / base.norm()).item() > 0.01
    assert ((drawn - expected).norm() / expected.norm()).item() <= tolerance


@pytest.fixture(scope="module")
def base(family: BaseFamily) -> Tensor:
    return trainer_latents(family)


# What it draws


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5, -1.0])
def test_latents_are_the_trainers_at_every_strength(
    comfy: Comfy, loras: Path, family: BaseFamily, layers: Any, base: Tensor, strength: float
):
    expected = trainer_latents(family, [(layers["a"], lambda step: strength)])
    check_same(model_latents(comfy, family, drawing_with(adapted(strength=strength))), expected, base)


def test_at_strength_0_it_is_the_base_to_the_bit(comfy: Comfy, loras: Path, family: BaseFamily):
    expected = model_latents(comfy, family, drawing(seed=SEED))
    assert torch.equal(model_latents(comfy, family, drawing_with(adapted(strength=0.0))), expected)
    assert torch.equal(model_latents(comfy, family, drawing_with(adapted(schedule="0:0, 1:0"))), expected)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("0:0, 1:1", [0, 1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1]),
        ("0.5:1, 0.5:0", [1, 1, 1, 1, 0, 0, 0, 0]),
        (" 0:2,0.5:0 , 1:-1", [2, 2 - 4 / 7, 2 - 8 / 7, 2 - 12 / 7, -1 / 7, -3 / 7, -5 / 7, -1]),
        ("0.5", [0.5] * 8),
    ],
)
def test_a_schedule_sets_the_strength_of_every_step(
    comfy: Comfy, loras: Path, family: BaseFamily, layers: Any, base: Tensor, schedule: str, factors: list[float]
):
    expected = trainer_latents(family, [(layers["a"], lambda step: 1.5 * factors[step])])
    drawn = model_latents(comfy, family, drawing_with(adapted(strength=1.5, schedule=schedule)))
    check_same(drawn, expected, base)


def test_what_a_schedule_left_behind_does_not_reach_other_graphs(comfy: Comfy, loras: Path, family: BaseFamily):
    """The layers of a model are one and the same in all graphs."""
    expected = model_latents(comfy, family, drawing(seed=SEED))
    model_latents(comfy, family, drawing_with(adapted(schedule="0:1, 1:0"), seed=SEED + 1))
    comfy.run(drawing(seed=SEED + 2))  # what was drawn before is not drawn again
    assert torch.equal(
        model_latents(comfy, family, drawing(seed=SEED) | {"other": node("NGRPO_LoadEmbedded")}), expected
    )


# What does not get through


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strength": "nan"}, "strength must be finite, got nan"),
        ({"strength": "inf"}, "strength must be finite, got inf"),
        ({"schedule": "0:0, 1"}, "schedule must be a number, or places with factors"),
        ({"schedule": "0:0, 2:1"}, "places of a schedule must go up from 0"),
        ({"lora_name": "../a.safetensors"}, "lora_name must be a file in ComfyUI's loras folder"),
        ({"lora_name": "nowhere.safetensors"}, "lora_name must be a file in ComfyUI's loras folder"),
    ],
)
def test_a_bad_input_is_refused_before_anything_runs(comfy: Comfy, loras: Path, settings: dict[str, Any], reason: str):
    with pytest.raises(Refused) as refused:
        comfy.submit(drawing_with(adapted(**settings)))
    assert refused.value.status == 400
    assert reason in refused.value.reasons
