"""Every node is described, and every shipped graph opens, validates and runs, in the real engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import make_workflows
import pytest
from comfy_cli.workflow_to_api import convert_ui_to_api
from comfy_client import REPOSITORY, Comfy, Refused
from PIL import Image
from safetensors.torch import load_file
from sheet import choices_of, default_of, options_of, type_of
from voters import attended
from wires import contains, curve, nodes_before, overlap

from ngrpo_lora.world import MODELS

WORKFLOWS = REPOSITORY / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
NEEDS_FLUX = {"sample-flux-with-adapter", "train-flux"}


@pytest.fixture(scope="module")
def schemas(comfy: Comfy) -> dict[str, Any]:
    return comfy.get("/object_info")


@pytest.fixture(scope="module")
def ours(schemas: dict[str, Any]) -> dict[str, Any]:
    return {name: schema for name, schema in schemas.items() if name.startswith("NGRPO_")}


def inputs_of(schema: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: spec for part in ("required", "optional") for name, spec in schema["input"].get(part, {}).items()}


def read(name: str, folder: str = ".") -> dict[str, Any]:
    return json.loads((WORKFLOWS / folder / f"{name}.json").read_text(encoding="utf-8"))


# Nodes


def test_every_input_says_what_it_is_and_numbers_have_ranges(ours: dict[str, Any]):
    assert len(ours) >= 11
    for name, schema in ours.items():
        assert schema["category"].startswith("Neighbor GRPO"), name
        assert schema["description"].endswith("."), name
        for input_name, spec in inputs_of(schema).items():
            options = options_of(spec)
            assert options.get("tooltip"), f"{name}.{input_name}"
            if type_of(spec) in ("INT", "FLOAT") and not options.get("forceInput"):
                assert options["min"] <= options["default"] <= options["max"], f"{name}.{input_name}"
            if (choices := choices_of(spec)) and "default" in options:
                assert options["default"] in choices, f"{name}.{input_name}"


def test_widgets_that_few_need_are_marked(ours: dict[str, Any]):
    marked = {
        name.removeprefix("NGRPO_"): found
        for name, schema in ours.items()
        if (found := [key for key, spec in inputs_of(schema).items() if options_of(spec).get("advanced")])
    }
    assert marked == {
        "Compare": ["cell_px"],
        "FlowSigmas": ["shift", "denoise"],
        "LoadAdapter": ["alpha"],
        "LoadPipeline": ["dtype", "swap_blocks", "vae_tiling"],
        "NeighborNoise": ["around"],
        "PipelineSample": ["solver", "shift"],
        "Score": ["metadata"],
        "VLMJudge": ["answer"],
        "VoteReward": ["phone", "port"],
    }


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(comfy: Comfy, ours: dict[str, Any]):
    for name, schema in ours.items():
        page = comfy.fetch(f"/extensions/ngrpo-lora/docs/{name}.md").decode()
        assert page.startswith(f"# {schema['display_name']}\n"), name
        assert "## Example" in page, name
        assert "## Troubleshooting" in page, name
        assert f"![{schema['display_name']}](images/{name}.webp)" in page, name
        with Image.open(BytesIO(comfy.fetch(f"/extensions/ngrpo-lora/docs/images/{name}.webp"))) as picture:
            assert picture.format == "WEBP", name
            assert picture.width >= 300, name
        for word in [*inputs_of(schema), *schema["output_name"]]:
            is_one_of_many = re.search("_([3-9]|1[0-5])$", word)  # inputs that grow: the first two and the last
            assert is_one_of_many or f"**{word}**" in page, f"{word} in {name}"
    pages = {path.stem for path in (REPOSITORY / "comfy_nodes" / "web" / "docs").glob("*.md")}
    assert pages == ours.keys()


def test_every_text_of_every_node_is_translated(comfy: Comfy, ours: dict[str, Any]):
    translated = comfy.get("/i18n")["zh"]["nodeDefs"]
    assert {name for name in translated if name.startswith("NGRPO_")} == ours.keys()
    for name, schema in ours.items():
        texts = translated[name]
        assert texts["display_name"] != schema["display_name"], name
        assert texts["description"] != schema["description"], name
        assert texts["inputs"].keys() == inputs_of(schema).keys(), name
        assert all(text["name"] and text["tooltip"] for text in texts["inputs"].values()), name
        assert [*texts["outputs"]] == [str(slot) for slot in range(len(schema["output"]))], name
        told = [slot for slot, tooltip in enumerate(schema["output_tooltips"] or []) if tooltip]
        assert all(texts["outputs"][str(slot)]["tooltip"] for slot in told), name


def test_a_translation_names_all_choices_that_the_original_names(comfy: Comfy, ours: dict[str, Any]):
    translated, found = comfy.get("/i18n")["zh"]["nodeDefs"], 0
    for name, schema in ours.items():
        for widget, (kind, settings) in inputs_of(schema).items():
            own = settings.get("tooltip", "")
            named = [one for one in settings.get("options", []) if kind == "COMBO" and f"{one}: " in own]
            chinese = translated[name]["inputs"][widget]["tooltip"]
            words = {*re.findall(r"\w+(?: \w+)*", chinese, re.ASCII)}
            known = translated[name]["inputs"][widget].get("options", {})
            assert not [one for one in named if one not in words and known.get(one, one) not in chinese], (name, widget)
            found += len(named)
    assert found > 20


def test_the_embedded_model_is_as_large_as_its_node_says(ours: dict[str, Any]):
    weights = [load_file(file) for file in MODELS["embedded"].rglob("*.safetensors")]
    millions = sum(one.numel() for tensors in weights for one in tensors.values()) / 1e6
    assert f"{millions:.1f} million parameters" in ours["NGRPO_LoadEmbedded"]["description"]


# Graphs


def test_the_files_are_what_the_script_writes(schemas: dict[str, Any], tmp_path: Path):
    make_workflows.write(schemas, tmp_path)
    written = {path.relative_to(tmp_path): path.read_text("utf-8") for path in tmp_path.rglob("*.json")}
    shipped = {path.relative_to(WORKFLOWS): path.read_text("utf-8") for path in WORKFLOWS.rglob("*.json")}
    assert written == shipped, "run `make comfy-workflows`"


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_opens(comfy: Comfy, schemas: dict[str, Any], name: str):
    served = comfy.get(f"/api/workflow_templates/ngrpo-lora/{name}.json")
    assert served == read(name)
    nodes = {node["id"]: node for node in served["nodes"]}
    notes = [node for node in nodes.values() if node["type"] == "MarkdownNote"]
    assert 1 <= len(notes) <= 3
    assert {node["type"] for node in nodes.values()} <= schemas.keys() | {"MarkdownNote"}
    for node in nodes.values():
        assert "randomize" not in node["widgets_values"], node
    for link, source, slot, target, place, kind in served["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == link
        assert nodes[source]["outputs"][slot]["type"] == kind
    assert convert_ui_to_api(served, schemas) == read(name, "api")


@pytest.mark.parametrize("make", make_workflows.GRAPHS, ids=lambda make: make.__name__)
def test_no_node_overlaps_another_or_a_wire_that_is_not_its_own(schemas: dict[str, Any], make: Any):
    sheet = make(schemas)
    boxes = {node.name: node.box for node in sheet.nodes}
    assert not [pair for pair in combinations(boxes, 2) if overlap(boxes[pair[0]], boxes[pair[1]])]
    groups = [group["bounding"] for group in sheet.groups]
    assert not [pair for pair in combinations(groups, 2) if overlap(*pair)]
    assert all(any(contains(group, box) for group in groups) for box in boxes.values())
    reroutes = sheet.reroutes()
    for link in sheet.links:
        start, ends, own = sheet.ends(link)
        way = [one["pos"] for one in reroutes if one["linkIds"] == [link[0]]]
        for end in ends:
            assert not nodes_before(curve([start, *way, end]), own, boxes), link


@pytest.mark.parametrize("name", NAMES)
def test_what_is_hidden_in_a_graph_has_its_default(schemas: dict[str, Any], name: str):
    for node in read(name, "api").values():
        for key, spec in inputs_of(schemas[node["class_type"]]).items():
            if node["class_type"].startswith("NGRPO_") and options_of(spec).get("advanced"):
                assert node["inputs"][key] == default_of(spec), f"{node['class_type']}.{key}"


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_has_a_thumbnail(comfy: Comfy, name: str):
    assert name in comfy.get("/workflow_templates")["ngrpo-lora"]
    with Image.open(BytesIO(comfy.fetch(f"/api/workflow_templates/ngrpo-lora/{name}.jpg"))) as picture:
        assert picture.format == "JPEG"
        assert picture.width == picture.height >= 256


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_validates(schemas: dict[str, Any], tmp_path: Path, name: str):
    known = json.loads(json.dumps(schemas))
    for node in read(name, "api").values():  # files of FLUX.1 as if they were there
        for key, value in node["inputs"].items() if name in NEEDS_FLUX else ():
            if isinstance(value, str) and value.endswith(".safetensors"):
                choices = choices_of(inputs_of(known[node["class_type"]])[key])
                assert choices is not None
                choices.append(value)
    (tmp_path / "object_info.json").write_text(json.dumps(known))
    for path in (WORKFLOWS / f"{name}.json", WORKFLOWS / "api" / f"{name}.json"):
        command = [str(Path(sys.executable).with_name("comfy")), "--skip-prompt", "--json", "workflow", "validate"]
        command += ["--workflow", str(path), "--where", "local", "--input", str(tmp_path / "object_info.json")]
        environment = os.environ | {"DO_NOT_TRACK": "1", "HOME": str(tmp_path)}
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        report = json.loads(answer.stdout)
        assert report["ok"], answer.stdout
        assert report["data"]["valid"], answer.stdout


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEEDS_FLUX])
def test_a_graph_of_the_embedded_model_runs_to_the_end(comfy: Comfy, name: str):
    graph = read(name, "api")
    for node in graph.values():
        if node["class_type"] == "NGRPO_Train":
            kept = [line for line in node["inputs"]["overrides"].splitlines() if "num_prompts" not in line]
            node["inputs"] |= {"iterations": 2, "overrides": "\n".join([*kept, "evaluation.num_prompts=4"])}
            # A test of the interface may have run the same graph.
            node["inputs"]["earlier_run"] = "start anew beside it"
    with attended(comfy):  # by somebody who votes where a graph asks
        result = comfy.run(graph)
    assert result.status == "success", result.error
    pictures = [picture for shown in result.outputs.values() for picture in shown.get("images", [])]
    assert pictures
    for described in pictures:
        low, high = comfy.image(described).convert("L").getextrema()
        assert high - low > 64, described


@pytest.mark.parametrize(
    ("name", "lack"), [("sample-flux-with-adapter", ".safetensors"), ("train-flux", "the model's device is cpu")]
)
def test_a_graph_of_flux_lacks_nothing_but_files_or_a_gpu(comfy: Comfy, name: str, lack: str):
    with pytest.raises(Refused) as refused:
        comfy.submit(read(name, "api"))
    assert refused.value.body["error"]["type"] == "prompt_outputs_failed_validation"
    errors = [error for node in refused.value.body["node_errors"].values() for error in node["errors"]]
    assert errors
    assert all(lack in error["details"] for error in errors), errors
