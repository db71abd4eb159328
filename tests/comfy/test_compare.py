"""Compare: every cell is what Load Adapter draws alone; captions, scores and marks are of the right picture."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import loras_folder, random_layers, save_adapter
from comfy_client import Comfy, Graph, Refused, Result
from graphs import PROMPT, drawing, node
from PIL import Image

from ngrpo_lora.adapters.reading import Layer
from ngrpo_lora.config import ModelConfig, RewardConfig
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.scoring.scorer import load_reward

HEADER = {"ss_base_model_version": "flux1"}


@pytest.fixture(scope="module")
def loras(comfy: Comfy) -> Path:
    """The server's folder with two adapters, one of which ruins the pictures."""
    folder, family = loras_folder(comfy), load_family(ModelConfig(device="cpu"))
    mild = random_layers(family, seed=1)
    save_adapter(folder / "sub" / "mild.safetensors", mild, HEADER)
    save_adapter(folder / "ruin.safetensors", random_layers(family, seed=2, size=60.0), HEADER)
    other = Layer(mild["transformer_blocks.0.attn.to_q"].down[:, :100], mild["transformer_blocks.0.attn.to_q"].up)
    save_adapter(folder / "other_size.safetensors", {"transformer_blocks.0.attn.to_q": other}, HEADER)
    return folder


def comparison(**settings: Any) -> Graph:
    """Base, mild at two strengths and ruin, for two seeds, judged by the world's verifier."""
    graph = {name: one for name, one in drawing().items() if name in ("model", "text", "sampler", "sigmas", "latent")}
    given = {"noise_seed": 7, "num_seeds": 2, "base_too": True, "cfg": 1.0, "prompt": PROMPT, "cell_px": 200}
    links = {"model": "model", "positive": "text", "sampler": "sampler", "sigmas": "sigmas", "latent_image": "latent"}
    given |= {name: [source, 0] for name, source in links.items()} | {"vae": ["model", 2]}
    given |= {"adapters": ["ruin", 0], "rewards": ["reward", 0]}
    return graph | {
        "mild": node("NGRPO_AdapterList", lora_name="sub/mild.safetensors", strengths="1, -0.5"),
        "ruin": node("NGRPO_AdapterList", lora_name="ruin.safetensors", strengths="1", adapters=["mild", 0]),
        "reward": node("NGRPO_Reward", name="world", weight=1.0, settings=""),
        "compare": node("NGRPO_Compare", **given | settings),
        "show": node("PreviewImage", images=["compare", 1]),
    }


@pytest.fixture(scope="module")
def result(comfy: Comfy, loras: Path) -> Result:
    result = comfy.run(comparison())
    assert result.status == "success", result.error
    return result


def shown(comfy: Comfy, result: Result, by: str = "show") -> list[Image.Image]:
    assert result.status == "success", result.error
    return [comfy.image(one).convert("RGB") for one in result.outputs[by]["images"]]


def test_every_picture_is_what_load_adapter_draws_alone(comfy: Comfy, result: Result):
    pictures = shown(comfy, result)
    assert len(pictures) == 8
    columns = [("sub/mild", 0.0), ("sub/mild", 1.0), ("sub/mild", -0.5), ("ruin", 1.0)]
    for row, seed in enumerate([7, 8]):
        for column, (name, strength) in enumerate(columns):
            graph = drawing(seed=seed)
            given = {"lora_name": f"{name}.safetensors", "strength": strength, "schedule": "", "alpha": "fold in"}
            graph["load"] = node("NGRPO_LoadAdapter", model=["model", 0], **given)
            graph["guider"]["inputs"]["model"] = ["load", 0]
            (alone,) = shown(comfy, comfy.run(graph))
            assert np.array_equal(np.asarray(alone), np.asarray(pictures[4 * row + column])), (seed, name)


def test_a_schedule_is_that_of_load_adapter(comfy: Comfy, loras: Path):
    schedule = "0:1, 0.5:1, 0.5:0"
    graph = comparison(num_seeds=1, adapters=["mild", 0])
    del graph["compare"]["inputs"]["rewards"]
    graph["mild"]["inputs"] |= {"strengths": "1", "schedule": f" {schedule} ", "adapters": ["whole", 0]}
    graph["whole"] = node("NGRPO_AdapterList", lora_name="sub/mild.safetensors", strengths="1")
    result = comfy.run(graph)
    _, whole, early = map(np.asarray, shown(comfy, result))
    assert result.outputs["compare"]["text"] == [f"not judged; seeds 7; base, mild, mild, {schedule}"]
    alone = drawing(seed=7)
    given = {"lora_name": "sub/mild.safetensors", "strength": 1.0, "schedule": schedule, "alpha": "fold in"}
    alone["load"] = node("NGRPO_LoadAdapter", model=["model", 0], **given)
    alone["guider"]["inputs"]["model"] = ["load", 0]
    (expected,) = map(np.asarray, shown(comfy, comfy.run(alone)))
    assert np.array_equal(early, expected)
    assert not np.array_equal(early, whole)


@pytest.mark.parametrize(
    ("lists", "captions"),
    [
        pytest.param([("base", "1")], "base, base-2", id="a file that is called base"),
        pytest.param([("mild", "0.1234567, 0.1234568")], "base, mild x 0.1234567, mild x 0.1234568", id="close"),
        pytest.param([("mild", "0, -0, 0")], "base, mild x 0", id="one column is drawn once"),
        pytest.param([("a b", "1"), ("a-b", "1")], "base, a b, a-b", id="named alike in captions"),
        pytest.param([("mild", "2"), ("mild x 2", "1")], "base, mild x 2, mild-x-2", id="named as a strength is"),
        pytest.param(
            [("two/a b", "1"), ("two-a b", "1"), ("two/a-b", "1")], "base, two/a b, two-a b, two/a-b", id="sub"
        ),
        pytest.param([("twin", "1"), ("twin.sft", "1")], "base, twin, twin-2", id="of two suffixes"),
    ],
)
def test_no_column_takes_the_place_of_another(comfy: Comfy, loras: Path, lists: list[tuple[str, str]], captions: str):
    graph, last = comparison(num_seeds=1), None
    for number, (file, strengths) in enumerate(lists):
        name = file if file.endswith(".sft") else f"{file}.safetensors"
        (loras / name).parent.mkdir(exist_ok=True)
        if file != "mild":
            shutil.copy(loras / "sub" / "mild.safetensors", loras / name)
        last, earlier = f"list_{number}", last
        further = {"adapters": [earlier, 0]} if earlier else {}
        graph[last] = node(
            "NGRPO_AdapterList", lora_name=name if file != "mild" else f"sub/{name}", strengths=strengths
        )
        graph[last]["inputs"] |= further
    graph["compare"]["inputs"]["adapters"] = [last, 0]
    del graph["compare"]["inputs"]["rewards"]
    result = comfy.run(graph)
    columns = captions.split(", ")
    base, *others = map(np.asarray, shown(comfy, result))
    assert result.outputs["compare"]["text"] == [f"not judged; seeds 7; {captions}"]
    assert len(others) == len(columns) - 1
    (alone,) = map(np.asarray, shown(comfy, comfy.run(drawing(seed=7))))
    assert np.array_equal(base, alone)


def test_the_grid_says_what_is_what(comfy: Comfy, result: Result):
    """Each cell holds its picture; the frame is around those of the row that nothing beats."""
    (grid,) = shown(comfy, result, "compare")
    pictures = shown(comfy, result)
    width, height = grid.width // 4, grid.height // 2
    assert (grid.width, height > 200) == (800, True)
    lines = result.outputs["compare"]["text"][0].splitlines()
    scores = [float(line.split("|")[3]) for line in lines if line.startswith(("| 7 ", "| 8 "))]
    for place, picture in enumerate(pictures):
        left, top = place % 4 * width, place // 4 * height
        inside = grid.crop((left + 3, top + 3, left + 197, top + 197))
        expected = picture.resize((194, 194), Image.Resampling.NEAREST)
        assert np.abs(np.asarray(inside, int) - np.asarray(expected, int)).max() <= 1, place
        framed = grid.getpixel((left + 100, top + 1)) == (26, 156, 63)
        row = scores[place // 4 * 4 : place // 4 * 4 + 4]
        assert framed == (scores[place] == max(row)), place
    assert len(scores) == 8
    assert scores[3] < scores[0]  # ruin is beaten, and is not framed
    assert scores[7] < scores[4]


def test_the_table_has_every_score_and_paired_differences(comfy: Comfy, result: Result):
    (text,) = result.outputs["compare"]["text"]
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    assert cells[0] == ["seed", "drawn with", "world", ""]
    labels = ["base", "mild", "mild x -0.5", "ruin"]
    assert [row[:2] for row in cells[2:10]] == [[seed, label] for seed in "78" for label in labels]
    verifier = load_reward(RewardConfig(name="world"), "cpu")
    for row, picture in zip(cells[2:10], shown(comfy, result), strict=True):
        (expected,) = verifier([picture], [PROMPT], [{}])
        assert float(row[2]) == pytest.approx(expected, abs=6e-4)
    assert [row[:2] for row in cells if row[1] == "base" and row[2] == "world"] == [[one, "base"] for one in labels[1:]]


def test_progress_counts_every_step(result: Result):
    own = [(value, maximum) for node_id, value, maximum in result.progress if node_id == "compare"]
    assert own[-1] == (8 * 8, 8 * 8)
    assert [value for value, _ in own] == sorted(value for value, _ in own)


def test_without_rewards_and_adapters_it_is_a_grid_of_the_base(comfy: Comfy, loras: Path):
    graph = comparison(num_seeds=3, base_too=False)
    for name in ("adapters", "rewards"):
        del graph["compare"]["inputs"][name]
    result = comfy.run(graph)
    assert len(shown(comfy, result)) == 3
    assert result.outputs["compare"]["text"] == ["not judged; seeds 7, 8, 9; base"]


def test_guidance_by_two_passes(comfy: Comfy, loras: Path):
    """As SamplerCustom has it, of the same seed."""
    graph = comparison(num_seeds=1, cfg=2.0, negative=["none", 0])
    graph["none"] = node("CLIPTextEncode", clip=["model", 1], text="a red circle")
    del graph["compare"]["inputs"]["adapters"]
    (picture,) = shown(comfy, comfy.run(graph))
    other = drawing(seed=7) | {"none": graph["none"]}
    given = {"add_noise": True, "noise_seed": 7, "cfg": 2.0, "positive": ["text", 0], "negative": ["none", 0]}
    links = {"model": ["model", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}
    other["sample"] = node("SamplerCustom", **given | links)
    (expected,) = shown(comfy, comfy.run(other))
    assert np.array_equal(np.asarray(picture), np.asarray(expected))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"cfg": 2.0}, "cfg must be 1 without negative, got 2"),
        ({"prompt": " "}, "reward world needs the prompt, got none"),
    ],
)
def test_what_it_cannot_do_it_says_before_it_draws(comfy: Comfy, loras: Path, settings: dict[str, Any], reason: str):
    result = comfy.run(comparison(**settings))
    assert (result.status, result.error_node) == ("error", "compare")
    assert reason in result.error
    assert not result.progress


def test_a_file_that_does_not_fit_is_known_before_anything_is_drawn(comfy: Comfy, loras: Path):
    graph = comparison()
    graph["ruin"]["inputs"]["lora_name"] = "other_size.safetensors"
    result = comfy.run(graph)
    assert (result.status, result.error_node) == ("error", "compare")
    assert "'other_size.safetensors' is no LoRA of this MODEL, a Flux (flux): 1 of its 1 layers" in result.error
    assert not [one for one in result.progress if one[0] == "compare"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strengths": "1, much"}, "strengths must be finite numbers with commas between"),
        ({"strengths": ""}, "strengths must be finite numbers with commas between"),
        ({"strengths": "1, nan"}, "strengths must be finite numbers with commas between"),
        ({"schedule": "0:1, much"}, "schedule must be a number, or places with factors"),
        ({"lora_name": "../../secret.safetensors"}, "lora_name must be a file in ComfyUI's loras folder"),
    ],
)
def test_a_bad_list_is_refused(comfy: Comfy, loras: Path, settings: dict[str, Any], reason: str):
    graph = comparison()
    graph["mild"]["inputs"] |= settings
    with pytest.raises(Refused) as refused:
        comfy.submit(graph)
    assert refused.value.status == 400
    assert reason in refused.value.reasons


def test_cancel_ends_it_at_once(comfy: Comfy, loras: Path):
    graph = comparison(num_seeds=64, noise_seed=100)
    with comfy.listening() as (client, messages):
        prompt = comfy.submit(graph, client)
        time.sleep(2)
        comfy.interrupt()
        start = time.monotonic()
        assert comfy.follow(prompt, messages).status == "interrupted"
        assert time.monotonic() - start < 1
    assert comfy.run(comparison(num_seeds=1)).status == "success"
