"""Nodes that are graphs: ComfyUI offers them, and they run as parts of a graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_workflows
import pytest
from comfy_cli.workflow_to_api import convert_ui_to_api
from comfy_client import REPOSITORY, Comfy, Graph

FOLDER = REPOSITORY / "subgraphs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
MODEL = {"model": 0, "clip": 1, "vae": 2}  # of Load Embedded Model


@pytest.fixture(scope="module")
def schemas(comfy: Comfy) -> dict[str, Any]:
    return comfy.get("/object_info")


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def used(name: str, output: str, schemas: dict[str, Any], values: dict[str, Any]) -> Graph:
    """A graph in API format: the embedded model, the blueprint with values of its widgets, and its picture."""
    graph = read(name)
    (whole,) = graph["nodes"]
    slot = [one["name"] for one in whole["outputs"]].index(output)
    load = {"id": 2, "type": "NGRPO_LoadEmbedded", "mode": 0, "inputs": [], "outputs": [], "widgets_values": []}
    show = {"id": 3, "type": "PreviewImage", "mode": 0, "outputs": [], "widgets_values": []}
    graph["nodes"] += [load, show | {"inputs": [{"name": "images", "type": "IMAGE", "link": 9}]}]
    graph["links"] = [[9, whole["id"], slot, 3, 0, "IMAGE"]]
    for place, entry in enumerate(whole["inputs"]):
        if entry["name"] in MODEL:
            entry["link"] = 10 + place
            graph["links"].append([10 + place, 2, MODEL[entry["name"]], whole["id"], place, entry["type"]])
    whole["widgets_values"] = [values.get(one["name"]) for one in whole["inputs"] if "widget" in one]
    return convert_ui_to_api(graph, schemas)


def test_the_files_are_what_the_script_writes(schemas: dict[str, Any], tmp_path: Path):
    make_workflows.write_blueprints(schemas, tmp_path)
    written = {path.name: path.read_text("utf-8") for path in tmp_path.glob("*.json")}
    assert written == {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.json")}


def test_comfyui_offers_them(comfy: Comfy):
    offered = comfy.get("/global_subgraphs")
    ours = {entry["name"]: key for key, entry in offered.items() if entry["info"]["node_pack"].endswith(".ngrpo-lora")}
    assert sorted(ours) == NAMES
    assert len(NAMES) == 2
    for name, key in ours.items():
        assert json.loads(comfy.get(f"/global_subgraphs/{key}")["data"]) == read(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_wires_within_meet_their_ends(name: str, schemas: dict[str, Any]):
    graph = read(name)
    (whole,), (inner,) = graph["nodes"], graph["definitions"]["subgraphs"]
    assert whole["type"] == inner["id"]
    assert [one["name"] for one in whole["inputs"]] == [one["name"] for one in inner["inputs"]]
    assert [one["name"] for one in whole["outputs"]] == [one["name"] for one in inner["outputs"]]
    nodes = {node["id"]: node for node in inner["nodes"]}
    assert {node["type"] for node in nodes.values()} <= schemas.keys()
    for link in inner["links"]:
        if link["origin_id"] == -10:
            assert link["id"] in inner["inputs"][link["origin_slot"]]["linkIds"]
        else:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
        if link["target_id"] == -20:
            assert link["id"] in inner["outputs"][link["target_slot"]]["linkIds"]
        else:
            assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]


def test_an_adapter_draws(comfy: Comfy, schemas: dict[str, Any]):
    values = {"text": "a red star", "lora_name": "ngrpo-demo.safetensors", "batch_size": 2, "strength": 1.0}
    graph = used("Adapter to Picture", "IMAGE", schemas, values | {"noise_seed": 3})
    (prompt,) = [one["inputs"]["text"] for one in graph.values() if one["class_type"] == "CLIPTextEncode"]
    assert prompt == "a red star"
    result = comfy.run(graph)
    assert result.status == "success", result.error
    assert len(result.outputs["3"]["images"]) == 2


def test_an_adapter_is_trained_and_compared(comfy: Comfy, schemas: dict[str, Any]):
    values = {"preset": "demo", "name": "of-a-blueprint", "iterations": 1, "text": "a red star", "num_seeds": 2}
    values |= {"overrides": "evaluation.num_prompts=4"}
    result = comfy.run(used("Train Adapter and Compare", "grid", schemas, values), 900)
    assert result.status == "success", result.error
    (grid,) = result.outputs["3"]["images"]
    assert comfy.image(grid).width == 2 * 256
    assert (comfy.base / "models" / "loras" / "ngrpo" / "of-a-blueprint.safetensors").is_file()
