"""Values of widgets, those too that other nodes give: ComfyUI checks the range of neither where a node checks some."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from comfy_client import Comfy
from graphs import drawing, node

LISTS_OF_FILES = {"lora_name", "function", "lora"}
"""Choices whose nodes have messages of their own."""


def all_nodes() -> dict[str, Any]:
    """All nodes by the names of their classes."""
    from comfy_nodes import comfy_entrypoint

    async def listed() -> list[Any]:
        return await (await comfy_entrypoint()).get_node_list()

    return {one.__name__: one for one in asyncio.run(listed())}


@pytest.mark.usefixtures("in_process")
def test_no_node_executes_with_what_none_of_its_widgets_could_have():
    from comfy_api.latest import io

    wrong: dict[type, Any] = {io.Int.Input: 0.5, io.Float.Input: "1", io.String.Input: None, io.Boolean.Input: "no"}
    found = 0
    for name, one in all_nodes().items():
        for widget in one.define_schema().inputs:
            values = [wrong[type(widget)]] if type(widget) in wrong else []
            if isinstance(widget, io.Int.Input | io.Float.Input):
                assert widget.min is not None, (name, widget.id)
                values += [widget.min - 1, 2**64, float("nan"), float("inf")]
            for value in values:
                with pytest.raises(
                    ValueError, match=rf"^{widget.id} must be .*, got {value!r}; change it here"
                ) as error:
                    one.execute(**{widget.id: value})
                assert type(error.value).__name__ == "ConfigError"
                found += 1
    assert found > 150


@pytest.mark.usefixtures("in_process")
def test_every_choice_is_checked_before_anything_runs():
    from comfy_api.latest import io

    found = 0
    for name, one in all_nodes().items():
        widgets = [widget for widget in one.define_schema().inputs if isinstance(widget, io.WidgetInput)]
        given = {widget.id: widget.default for widget in widgets} | {"votes": ""}
        given |= {"lora_name": "ngrpo-demo.safetensors", "function": "", "prompt": "a star"}
        for widget in widgets:
            if isinstance(widget, io.Combo.Input) and widget.id not in LISTS_OF_FILES:
                taken = inspect.signature(one.validate_inputs).parameters
                assert widget.id in taken, f"{name} leaves {widget.id} unchecked, which ComfyUI 0.3.75 does too"
                asked = {key: value for key, value in given.items() if key in taken} | {widget.id: "nonsense"}
                with pytest.raises(ValueError, match="nonsense"):
                    one.validate_inputs(**asked)
                found += 1
    assert found > 10


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("score.n", -1, "n must be a whole number from 1 to 4096, got -1; change it here, or in the node connected"),
        ("noise.member", -5, "member must be a whole number from -1 to 4095, got -5"),
        ("sigmas.denoise", 2.0, "denoise must be a number from 0.01 to 1, got 2.0"),
        ("sigmas.width", 50, "width must be a multiple of 16, got 50; the nearest are 48 and 64"),
        ("load.strength", 1000.0, "strength must be a number from -20 to 20, got 1000.0"),
    ],
)
def test_numbers_of_other_nodes_that_are_out_of_range_draw_nothing(comfy: Comfy, place: str, value: float, reason: str):
    graph = drawing(batch=3) | {
        "noise": node(
            "NGRPO_NeighborNoise", noise_seed=7, perturbation_strength=0.3, member=0, around="this seed's picture"
        ),
        "load": node(
            "NGRPO_LoadAdapter",
            model=["model", 0],
            lora_name="ngrpo-demo.safetensors",
            strength=1.0,
            schedule="",
            alpha="fold in",
        ),
        "reward": node("NGRPO_Reward", name="world", weight=1.0, settings=""),
        "score": node(
            "NGRPO_Score",
            images=["decode", 0],
            rewards=["reward", 0],
            prompt="a star above a heart",
            n=1,
            combine="raw",
            metadata="",
            sheet_px=64,
        ),
    }
    graph["guider"]["inputs"]["model"] = ["load", 0]
    at, widget = place.split(".")
    given = {"value": node("PrimitiveInt" if isinstance(value, int) else "PrimitiveFloat", value=value)}
    graph[at]["inputs"][widget] = ["value", 0]
    result = comfy.run(graph | given)
    assert (result.status, result.error_node) == ("error", at)
    assert reason in result.error


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_seeds_may_be_as_large_as_those_of_comfyuis_own_nodes(seed: int):
    given = {"noise_seed": seed, "perturbation_strength": 0.3, "member": 0, "around": "this seed's picture"}
    assert all_nodes()["NeighborNoise"].execute(**given).result[0].base_seed == seed


@pytest.mark.parametrize("scheduler", ["KarrasScheduler", "SplitSigmas"])
def test_noise_levels_of_no_flow_model_are_refused_with_what_gives_others(comfy: Comfy, scheduler: str):
    levels = {
        "KarrasScheduler": node("KarrasScheduler", steps=8, sigma_max=14.6, sigma_min=0.03, rho=7.0),
        "SplitSigmas": node("SplitSigmas", sigmas=["whole", 0], step=0),  # no step is left
    }
    graph = drawing()
    graph |= {"whole": graph["sigmas"], "sigmas": levels[scheduler]}
    result = comfy.run(graph)
    assert (result.status, result.error_node) == ("error", "sample")
    assert "decreasing within [0, 1], got [" in result.error
    assert result.error.strip().endswith("; Flow Sigmas and Load Adapter give such")
