"""Models that edit, in the graph: the embedded one as MODEL, its adapters compared, and trained with sources."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from adapters import loras_folder, random_layers, save_adapter
from comfy_client import Comfy, Graph, Result
from graphs import drawing, latents_of, node
from PIL import Image
from rounding import relative_error, with_rounding
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.sources import open_prompts
from ngrpo_lora.records.pictures import read_png_text
from ngrpo_lora.rewards import world_edit
from ngrpo_lora.sampling.sampler import solve

SEED = 7


@pytest.fixture(scope="module")
def edit() -> Prompt:
    return open_prompts("edits:train/recolor", 0).prompt(0)


@pytest.fixture(scope="module")
def source(comfy: Comfy, edit: Prompt) -> Image.Image:
    """What is edited; it is `source.png` in the server's input folder."""
    assert edit.source is not None
    picture = edit.source.load()
    picture.save(comfy.base / "input" / "source.png")
    return picture


@pytest.fixture(scope="module")
def family() -> BaseFamily:
    return load_family(ModelConfig(path="embedded-edit", device="cpu"))


def editing(edit: Prompt, **settings: Any) -> Graph:
    """The nodes of `drawing` with the model that edits, and its source as ComfyUI's nodes give it to FLUX.1-Kontext."""
    graph = drawing(seed=SEED, prompt=edit.text, **settings) | {
        "model": node("NGRPO_LoadEmbedded", model="embedded-edit"),
        "load": node("LoadImage", image="source.png"),
        "encode": node("VAEEncode", pixels=["load", 0], vae=["model", 2]),
        "reference": node("ReferenceLatent", conditioning=["text", 0], latent=["encode", 0]),
    }
    graph["guider"]["inputs"]["conditioning"] = ["reference", 0]
    graph["sigmas"]["inputs"]["base"] = "embedded-edit"
    return graph


def trainer_latents(family: BaseFamily, edit: Prompt) -> tuple[Tensor, float]:
    """The clean latents that the trainer draws, and the relative error that rounding explains."""
    noise, text = gaussian_noise((1, *family.latent_shape), SEED), family.encode([edit])
    return with_rounding(family.transformer, lambda: solve(family, text, noise, "dpmpp_2m", family.sigmas(8)))


def test_comfyui_edits_as_the_trainer_does(comfy: Comfy, source: Image.Image, family: BaseFamily, edit: Prompt):
    drawn = latents_of(comfy, comfy.run(editing(edit))) * family.vae.config.scaling_factor
    expected, rounding = trainer_latents(family, edit)
    assert relative_error(drawn, expected) <= rounding


def with_adapter(graph: Graph, file: str, strength: float) -> Graph:
    given = {"lora_name": file, "strength": strength, "schedule": "", "alpha": "fold in"}
    graph["lora"] = node("NGRPO_LoadAdapter", model=["model", 0], **given)
    graph["guider"]["inputs"]["model"] = ["lora", 0]
    return graph


# Compare


@pytest.fixture(scope="module")
def adapter(comfy: Comfy, family: BaseFamily) -> str:
    """The name of an adapter of the model that edits."""
    layers = random_layers(family, seed=1)
    return save_adapter(loras_folder(comfy) / "edits.safetensors", layers, {"ss_base_model_version": "flux1"}).name


def comparison(edit: Prompt, adapter: str, **settings: Any) -> Graph:
    """The model that edits and an adapter of it, judged beside the source."""
    kept = ("model", "text", "sampler", "sigmas", "latent", "load", "encode", "reference")
    graph = {name: one for name, one in editing(edit).items() if name in kept}
    given = {"noise_seed": SEED, "num_seeds": 2, "base_too": True, "cfg": 1.0, "prompt": edit.text, "cell_px": 96}
    links = {"model": "model", "positive": "reference", "sampler": "sampler", "sigmas": "sigmas"}
    links |= {"latent_image": "latent", "adapters": "list", "rewards": "reward", "source": "load"}
    given |= {name: [one, 0] for name, one in links.items()} | {"vae": ["model", 2]}
    return graph | {
        "list": node("NGRPO_AdapterList", lora_name=adapter, strengths="0.5"),
        "reward": node("NGRPO_Reward", name="world_edit", weight=1.0, settings=""),
        "compare": node("NGRPO_Compare", **given | settings),
        "show": node("PreviewImage", images=["compare", 1]),
    }


def shown(comfy: Comfy, result: Result, by: str = "show") -> list[Image.Image]:
    assert result.status == "success", result.error
    return [comfy.image(one).convert("RGB") for one in result.outputs[by]["images"]]


def test_edits_are_compared_beside_their_source(comfy: Comfy, source: Image.Image, edit: Prompt, adapter: str):
    result = comfy.run(comparison(edit, adapter))
    base, adapted, *_ = pictures = shown(comfy, result)
    assert len(pictures) == 4
    assert base.tobytes() != adapted.tobytes()
    for picture, graph in ((base, editing(edit)), (adapted, with_adapter(editing(edit), adapter, 0.5))):
        (alone,) = shown(comfy, comfy.run(graph))
        assert np.array_equal(np.asarray(picture), np.asarray(alone))
    expected = world_edit.score(pictures, [edit.text] * 4, [{"source": source}] * 4)
    table = "".join(result.outputs["compare"]["text"])
    assert all(f"{value:.3f}" in table for value in expected), (table, expected)
    (grid,) = shown(comfy, result, "compare")
    assert grid.width == 3 * 96
    large = source.resize((90, 90), Image.Resampling.NEAREST)
    for top in (3, 3 + grid.height // 2):
        assert np.array_equal(np.asarray(grid.crop((3, top, 93, top + 90))), np.asarray(large))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source": None}, "reward world_edit needs the source picture, got none; connect what the"),
        ({"source": ["twice", 0]}, "source must be one picture, as all that is compared has one prompt, got 2"),
        ({"positive": ["text", 0]}, "but positive has no picture and latent_image is empty; let ReferenceLatent"),
    ],
)
def test_what_cannot_be_compared_is_said_before_it_is_drawn(
    comfy: Comfy, source: Image.Image, edit: Prompt, adapter: str, change: dict[str, Any], reason: str
):
    graph = comparison(edit, adapter) | {"twice": node("RepeatImageBatch", image=["load", 0], amount=2)}
    given = graph["compare"]["inputs"] | change
    graph["compare"]["inputs"] = {name: one for name, one in given.items() if one is not None}
    result = comfy.run(graph)
    assert (result.status, result.error_node) == ("error", "compare")
    assert reason in result.error
    assert not [one for one in result.progress if one[0] == "compare"]


def test_a_picture_may_be_where_drawing_begins(comfy: Comfy, source: Image.Image, edit: Prompt, adapter: str):
    """An edit of a model that draws: ComfyUI's picture to picture."""
    graph = comparison(edit, adapter, num_seeds=1, positive=["text", 0], latent_image=["encode", 0])
    graph["sigmas"]["inputs"]["denoise"] = 0.5
    assert len(shown(comfy, comfy.run(graph))) == 2


def test_a_picture_without_its_source_is_not_scored_by_a_reward_of_edits(comfy: Comfy, source: Image.Image):
    score = {"prompt": "make the star blue", "n": 1, "combine": "raw", "metadata": "", "sheet_px": 64}
    graph = {
        "load": node("LoadImage", image="source.png"),
        "reward": node("NGRPO_Reward", name="preservation", weight=1.0, settings=""),
        "score": node("NGRPO_Score", images=["load", 0], rewards=["reward", 0], **score),
    }
    result = comfy.run(graph)
    assert "reward preservation needs the source picture, got none; connect what the" in result.error


# Train


SMALL = """
model.dtype=float32
rollout.num_steps=4
rollout.group_size=4
rollout.prompts_per_iteration=2
algorithm.num_anchors=2
algorithm.num_train_steps=2
algorithm.min_reward_spread=0
lora.rank=4
optimizer.learning_rate=5e-2
evaluation.num_prompts=2
"""


def write_edits(comfy: Comfy, name: str, rows: list[dict[str, Any]]) -> None:
    """A file of prompts in the server's input folder."""
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (comfy.base / "input" / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def edits(comfy: Comfy) -> list[Prompt]:
    """Edits in `edits.jsonl`, beside their sources."""
    prompts = [open_prompts("edits:train", 0).prompt(index) for index in range(4)]
    for index, prompt in enumerate(prompts):
        assert prompt.source is not None
        prompt.source.load().save(comfy.base / "input" / f"edit-{index}.png")
    write_edits(
        comfy, "edits.jsonl", [{"prompt": one.text, "source": f"edit-{index}.png"} for index, one in enumerate(prompts)]
    )
    return prompts


def train(name: str, *overrides: str, preset: str = "demo-edit", **inputs: Any) -> Graph:
    widgets = {"preset": preset, "iterations": 1, "run_seed": 0, "earlier_run": "go on with it"}
    given = {"name": name, "overrides": SMALL + "\n".join(overrides)}
    return {"train": node("NGRPO_Train", **(widgets | given | inputs))}


def test_edits_of_a_file_in_the_input_folder_are_trained_and_drawn_as_they_were_evaluated(
    comfy: Comfy, edits: list[Prompt]
):
    graph = train("edits", "prompts.train={edits.jsonl: 1}", "prompts.held_out=edits.jsonl#prompt")
    graph["figures"] = node("PreviewAny", source=["train", 4])
    result = comfy.run(graph)
    assert result.status == "success", result.error
    assert "world_edit" in result.outputs["figures"]["text"][0]
    path = comfy.base / "output" / "ngrpo" / "edits" / "samples" / "last" / "0.png"
    with Image.open(path) as evaluated:
        pixels = np.asarray(evaluated, int)
    text = read_png_text(path)
    (index,) = (index for index, one in enumerate(edits) if one.text == text["prompt"])
    drawn = with_adapter(editing(edits[index], steps=4), "ngrpo/edits.safetensors", 1.0)
    drawn["load"]["inputs"]["image"] = f"edit-{index}.png"
    drawn["noise"]["inputs"]["noise_seed"] = int(text["seed"])
    (picture,) = shown(comfy, comfy.run(drawn))
    assert np.abs(np.asarray(picture, int) - pixels).max() <= 1
    drawn["lora"]["inputs"]["strength"] = 0.0
    (base,) = shown(comfy, comfy.run(drawn))
    assert np.abs(np.asarray(base, int) - pixels).max() > 1


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            train("a", "prompts.train=words.jsonl"),
            "prompts.train must have a source picture with every prompt for 'embedded-edit', which starts from one, "
            "but 1 of 1 has none, first 'make the star blue' (line 1 of",
        ),
        (
            train("b", prompts="make the star blue"),
            "prompts must be empty for 'embedded-edit', which starts each prompt from a picture; write "
            "prompts.train=edits.jsonl into overrides",
        ),
        (
            train("c", "prompts.train=edits.jsonl", preset="demo"),
            "prompts.train must have no source pictures for 'embedded', which edits none, but line",
        ),
        (
            train("d", "prompts.train=elsewhere.jsonl"),
            "prompts.train must have source pictures in ComfyUI's folders, but '/elsewhere/a.png' (line 1 of",
        ),
        (train("e", "prompts.train=gone.jsonl"), "but 'gone.png' (line 1 of"),
    ],
    ids=["no source", "words", "draws", "elsewhere", "gone"],
)
def test_prompts_that_do_not_fit_the_model_are_refused_before_it_is_loaded(
    comfy: Comfy, edits: list[Prompt], graph: Graph, reason: str
):
    words = {"prompt": "make the star blue"}
    write_edits(comfy, "words.jsonl", [words])
    write_edits(comfy, "gone.jsonl", [words | {"source": "gone.png"}])
    write_edits(comfy, "elsewhere.jsonl", [words | {"source": "/elsewhere/a.png"}])
    result = comfy.run(graph)
    assert (result.status, result.error_node) == ("error", "train")
    assert reason in result.error
    assert result.error.count("must") == 1
    assert not [one for one in result.progress if one[0] == "train"]
