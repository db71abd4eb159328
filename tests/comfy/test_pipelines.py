"""diffusers pipelines as nodes draw what `ngrpo sample` draws and what ComfyUI's own path draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import loras_folder, random_layers, rounded_latents, save_adapter
from comfy_client import Comfy, Graph, Refused, Result
from graphs import PROMPT, drawing, latents_of, node, tiny_model
from PIL import Image
from rounding import relative_error
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ngrpo_lora.adapters.header import AdapterInfo
from ngrpo_lora.cli import app
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.equations.noise import gaussian_noise, neighbor_noise
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.pictures import SourcePicture
from ngrpo_lora.prompts.sources import open_prompts
from ngrpo_lora.rewards import world_edit
from ngrpo_lora.sampling.sampler import Sampler, solve
from ngrpo_lora.sampling.settings import editing as editing_where
from ngrpo_lora.sampling.settings import own_settings, with_settings
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.world import MODELS

OTHER = "a red circle"


def pipeline(model: str = "embedded", **widgets: Any) -> dict[str, Any]:
    defaults = {"dtype": "auto", "quantization": "none", "text_encoders": "keep", "swap_blocks": 0, "vae_tiling": False}
    return node("NGRPO_LoadPipeline", model=model, **(defaults | widgets))


def sampling(**widgets: Any) -> Graph:
    """Load, draw, and keep pictures and latents."""
    defaults = {
        "prompt": PROMPT,
        "seed": 7,
        "batch": 1,
        "width": 0,
        "height": 0,
        "steps": 0,
        "solver": "model's own",
        "shift": 0.0,
        "guidance": 0.0,
        "lora": "none",
        "strength": 1.0,
    }
    return {
        "pipeline": pipeline(),
        "sample": node("NGRPO_PipelineSample", pipeline=["pipeline", 0], **(defaults | widgets)),
        "save": node("SaveLatent", samples=["sample", 1], filename_prefix="pipeline"),
        "show": node("PreviewImage", images=["sample", 0]),
        "prompts": node("PreviewAny", source=["sample", 2]),
    }


def shown(comfy: Comfy, result: Result) -> list[list[int]]:
    assert result.status == "success", result.error
    return [np.asarray(comfy.image(one).convert("RGB")).tolist() for one in result.outputs["show"]["images"]]


def command(folder: Path, *arguments: str) -> list[list[int]]:
    """What `ngrpo sample` draws."""
    result = CliRunner().invoke(app, ["sample", "--output", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    return [np.asarray(Image.open(path).convert("RGB")).tolist() for path in sorted(folder.glob("*.png"))]


def refused(comfy: Comfy, graph: Graph) -> str:
    with pytest.raises(Refused) as refusal:
        comfy.run(graph)
    assert refusal.value.status == 400
    return refusal.value.reasons


def test_pictures_are_those_of_the_command_to_the_bit(comfy: Comfy, tmp_path: Path):
    result = comfy.run(sampling(prompt=f"{PROMPT}\n\n{OTHER}", batch=2))
    expected = command(tmp_path, "-p", PROMPT, "-p", OTHER, "--seed", "7", "--num-images", "2")
    assert shown(comfy, result) == expected
    assert result.outputs["prompts"]["text"][0].splitlines() == [PROMPT, PROMPT, OTHER, OTHER]


def test_settings_are_those_of_the_command(comfy: Comfy, tmp_path: Path):
    result = comfy.run(sampling(steps=5, solver="euler", shift=1.5, width=96, height=48))
    options = ["--steps", "5", "--solver", "euler", "--shift", "1.5", "--width", "96", "--height", "48"]
    assert shown(comfy, result) == command(tmp_path, "-p", PROMPT, "--seed", "7", *options)
    assert np.asarray(shown(comfy, result)[0]).shape == (48, 96, 3)
    again = comfy.run(sampling())  # the loaded model keeps nothing of it
    assert shown(comfy, again) == command(tmp_path / "again", "-p", PROMPT, "--seed", "7")


def test_a_lora_draws_as_it_was_trained_and_leaves_the_model_as_it_was(comfy: Comfy, tmp_path: Path):
    trained = {"model": ModelConfig(device="cpu").model_dump(), "rollout": RolloutConfig(num_steps=5).model_dump()}
    layers = random_layers(load_family(ModelConfig(device="cpu")))
    path = save_adapter(loras_folder(comfy) / "pipeline.safetensors", layers, {"ngrpo": json.dumps(trained)})
    base = shown(comfy, comfy.run(sampling()))
    with_it = shown(comfy, comfy.run(sampling(lora="pipeline.safetensors")))
    assert with_it == command(tmp_path / "a", "-p", PROMPT, "--seed", "7", "--adapter", str(path))
    assert with_it != base
    half = shown(comfy, comfy.run(sampling(lora="pipeline.safetensors", strength=0.5)))
    assert half == command(tmp_path / "b", "-p", PROMPT, "--seed", "7", "--adapter", str(path), "--strength", "0.5")
    assert half not in (base, with_it)
    assert shown(comfy, comfy.run(sampling(prompt=f" {PROMPT}"))) == base
    others = random_layers(load_family(ModelConfig(device="cpu")), seed=1)
    save_adapter(path, others, {"ngrpo": json.dumps(trained)})  # trained further, under the same name
    changed = shown(comfy, comfy.run(sampling(lora="pipeline.safetensors")))
    assert changed == command(tmp_path / "c", "-p", PROMPT, "--seed", "7", "--adapter", str(path))
    assert changed not in (base, with_it)


@pytest.mark.parametrize("size", [64, 96])
def test_latents_are_comfyuis_own(comfy: Comfy, size: int):
    native = latents_of(comfy, comfy.run(drawing(seed=7, size=size)))
    ours = latents_of(comfy, comfy.run(sampling(width=size, height=size)))
    family = load_family(ModelConfig(device="cpu", width_px=size, height_px=size))
    _, rounding = rounded_latents(family, noise=gaussian_noise((1, *family.latent_shape), 7))
    assert relative_error(ours, native) <= rounding


def test_neighbours_come_from_the_noise_input(comfy: Comfy):
    noise = node(
        "NGRPO_NeighborNoise", noise_seed=5, perturbation_strength=0.3, member=-1, around="this seed's picture"
    )
    native = latents_of(comfy, comfy.run(drawing(batch=3) | {"noise": noise}))
    graph = sampling(batch=3) | {"noise": noise}
    graph["sample"]["inputs"]["noise"] = ["noise", 0]
    ours = latents_of(comfy, comfy.run(graph))
    family = load_family(ModelConfig(device="cpu"))
    middle, first, second = (
        gaussian_noise(family.latent_shape, seed)
        for seed in (5, derive_seed(5, "delta", 0), derive_seed(5, "delta", 1))
    )
    neighbours = neighbor_noise(middle, torch.stack([first, second]), 0.3)
    _, rounding = rounded_latents(family, noise=torch.stack([middle, *neighbours]))
    assert relative_error(ours, native) <= rounding
    alone = latents_of(comfy, comfy.run(sampling(seed=5)))
    torch.testing.assert_close(ours[:1], alone, rtol=0, atol=0)  # the middle is the seed's picture


def editing(comfy: Comfy, source: Image.Image, **widgets: Any) -> Graph:
    """An edit of a picture in ComfyUI's input folder."""
    source.save(comfy.base / "input" / "source.png")
    graph = sampling(**widgets) | {
        "pipeline": pipeline("embedded-edit"),
        "load": node("LoadImage", image="source.png"),
    }
    graph["sample"]["inputs"]["source"] = ["load", 0]
    return graph


def test_an_edit_is_that_of_the_command_and_a_reward_of_edits_sees_its_source(comfy: Comfy, tmp_path: Path):
    prompt = open_prompts("edits:train/recolor", 0).prompt(0)
    assert prompt.source is not None
    source = prompt.source.load()
    graph = editing(comfy, source, prompt=prompt.text, batch=2)
    graph["reward"] = node("NGRPO_Reward", name="world_edit", weight=1.0, settings="")
    score = {"prompt": prompt.text, "n": 1, "combine": "standardized", "metadata": "", "sheet_px": 64}
    links = {"images": ["sample", 0], "rewards": ["reward", 0], "source": ["load", 0]}
    graph["score"] = node("NGRPO_Score", **score, **links)
    result = comfy.run(graph)
    drawn = shown(comfy, result)
    where = ["--source", str(comfy.base / "input" / "source.png"), "--model", "embedded-edit"]
    assert drawn == command(tmp_path, "-p", prompt.text, "--seed", "7", "--num-images", "2", *where)
    pictures = [Image.fromarray(np.array(one, np.uint8)) for one in drawn]
    expected = world_edit.score(pictures, [prompt.text] * 2, [{"source": source}] * 2)
    table = "".join(result.outputs["score"]["text"])
    assert all(f"{value:.3f}" in table for value in expected), (table, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sample": "source"}, "source must be connected for embedded-edit, which starts from one; connect Load Image"),
        (
            {"pipeline": "model"},
            "source must be left unconnected for embedded, which draws from words alone; disconnect it",
        ),
        ({"sample": "prompt"}, "source must be one picture, or one for each of the 3 prompts, got 2"),
        ({"load": "small"}, "source must have readable source pictures, but 'source' (the input source) is 1 x 1 px"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(comfy: Comfy, change: dict[str, str], reason: str):
    side = 1 if change == {"load": "small"} else 64
    graph = editing(comfy, Image.new("RGB", (side, side), "white"))
    if change == {"sample": "source"}:
        del graph["sample"]["inputs"]["source"]
    elif change == {"pipeline": "model"}:
        graph["pipeline"] = pipeline()
    elif change == {"sample": "prompt"}:
        graph["twice"] = node("RepeatImageBatch", image=["load", 0], amount=2)
        graph["sample"]["inputs"] |= {"source": ["twice", 0], "prompt": "add a star\nadd a heart\nadd a cross"}
    result = comfy.run(graph)
    assert result.status == "error"
    assert reason in str(result.error)


def test_progress_counts_steps_and_cancel_ends_within_one(comfy: Comfy):
    result = comfy.run(sampling(batch=2, steps=6, seed=3))
    own = [(value, maximum) for name, value, maximum in result.progress if name == "sample"]
    assert own[-1] == (12, 12)
    assert [image.size for image in result.previews][-1] == (512, 512)
    with comfy.listening() as (client, messages):
        prompt = comfy.submit(sampling(batch=500, steps=50, seed=4), client)
        while True:
            message = messages.recv()
            if isinstance(message, str) and '"type": "progress"' in message:
                break
        comfy.interrupt()
        interrupted = comfy.follow(prompt, messages)
    assert (interrupted.status, interrupted.seconds < 2) == ("interrupted", True)
    assert comfy.run(sampling(seed=9)).status == "success"


def test_a_folder_below_models_diffusers_is_in_the_list_and_a_video_gives_all_frames(comfy: Comfy):
    tiny_model(comfy, "wan", second=False)
    definition = comfy.get("/object_info/NGRPO_LoadPipeline")["NGRPO_LoadPipeline"]["input"]["required"]["model"]
    names = definition[1]["options"] if definition[0] == "COMBO" else definition[0]
    assert "diffusers/tiny/wan" in names
    graph = sampling(width=32, height=32, steps=2) | {"pipeline": pipeline("diffusers/tiny/wan")}
    result = comfy.run(graph)
    assert len(shown(comfy, result)) == 33
    assert latents_of(comfy, result).ndim == 5


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_folder_whose_files_were_replaced_is_loaded_again_and_only_then(comfy: Comfy, part: str):
    folder = comfy.base / "models" / "diffusers" / f"replaced-{part}"
    shutil.copytree(MODELS["embedded"], folder)
    graph = sampling() | {"pipeline": pipeline(f"diffusers/{folder.name}", dtype="float32")}
    before = shown(comfy, comfy.run(graph))
    assert shown(comfy, again := comfy.run(graph)) == before
    assert not again.progress  # of ComfyUI's cache
    (file,) = (folder / part).glob("*.safetensors")
    save_file({name: 0.9 * weight for name, weight in load_file(file).items()}, file)
    assert shown(comfy, comfy.run(graph)) != before


def sampler_here(comfy: Comfy, name: str, prompt: Prompt, **changes: int) -> Sampler:
    """Draws as the nodes do, in float32, but not on the server."""
    own = own_settings(str(comfy.base / "models" / name))
    whole = AdapterInfo(own.model.model_copy(update={"dtype": "float32", "device": "cpu"}), own.rollout)
    return Sampler(editing_where(with_settings(whole, changes), [prompt]))


def test_a_video_starts_from_its_source(comfy: Comfy):
    name = tiny_model(comfy, "wan_first_frame", "make_first_frame_folder")
    source = Image.linear_gradient("L").resize((64, 32)).convert("RGB")
    size = {"steps": 2, "width": 64, "height": 32}
    graph = editing(comfy, source, **size) | {"pipeline": pipeline(name, dtype="float32")}
    drawn = np.array(shown(comfy, comfy.run(graph)))
    picture = SourcePicture(comfy.base / "input" / "source.png", "source.png", "the test")
    prompt = Prompt(PROMPT, source=picture)
    frames = sampler_here(comfy, name, prompt, **size)([prompt], [7])
    expected = np.array([np.asarray(frame, int) for frame in frames])
    assert drawn.shape == expected.shape == (33, 32, 64, 3)
    assert np.abs(drawn - expected).max() <= 1  # a VAE of three dimensions rounds otherwise on other numbers of threads
    source.rotate(180).save(comfy.base / "input" / "turned.png")
    graph["load"]["inputs"]["image"] = "turned.png"
    assert np.abs(np.array(shown(comfy, comfy.run(graph))) - expected).max() > 1
    del graph["sample"]["inputs"]["source"]
    result = comfy.run(graph)
    assert "source must be connected for wan_first_frame, which starts from one" in result.error


def test_a_model_that_draws_and_edits_does_what_its_inputs_say(comfy: Comfy):
    name = tiny_model(comfy, "flux2_klein", distilled=True)
    source = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    size = {"steps": 2, "width": 96, "height": 64}
    graph = editing(comfy, source, **size) | {"pipeline": pipeline(name, dtype="float32")}
    words = sampling(**size) | {"pipeline": graph["pipeline"]}
    picture = SourcePicture(comfy.base / "input" / "source.png", "source.png", "the test")
    expected = []
    for prompt in (Prompt(PROMPT), Prompt(PROMPT, source=picture)):
        sampler = sampler_here(comfy, name, prompt, **size)
        noise = gaussian_noise((1, *sampler.family.latent_shape), 7)
        text = sampler.family.encode([prompt])
        expected.append(sampler.family.vae_latents(solve(sampler.family, text, noise, sampler.solver, sampler.sigmas)))
    assert relative_error(*expected) > 1e-4
    for given, which in ((words, 0), (graph, 1), (words, 0)):
        assert relative_error(latents_of(comfy, comfy.run(given)), expected[which]) < 1e-5
    followed = editing(comfy, source, steps=2) | {"pipeline": graph["pipeline"]}
    height, width = np.array(shown(comfy, comfy.run(followed))).shape[1:3]
    assert width / height == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize(
    ("widgets", "reason"),
    [
        ({"prompt": " \n "}, "prompt must not be empty"),
        ({"lora": "../../secret.safetensors"}, "must be a file in ComfyUI's loras folder"),
        ({"solver": "heun"}, "solver must be one of model's own, dpmpp_2m, euler, got 'heun'"),
        ({"steps": -1}, "smaller than min"),
    ],
)
def test_what_can_be_known_is_refused_before_anything_runs(comfy: Comfy, widgets: dict[str, Any], reason: str):
    assert reason in refused(comfy, sampling(**widgets))


def test_a_model_elsewhere_and_what_cannot_be_combined_are_refused(comfy: Comfy):
    for model in ("../../etc", "/etc", "someone/unknown", "diffusers/../../x"):
        assert "model must be one of embedded" in refused(comfy, sampling() | {"pipeline": pipeline(model)})
    both = pipeline(quantization="int8_torchao", swap_blocks=3)
    assert "swap_blocks must be 0 with a quantised base, got 3" in refused(comfy, sampling() | {"pipeline": both})


@pytest.mark.parametrize(
    ("widgets", "reason"),
    [
        ({"width": 72, "height": 64}, "width must be a multiple of 16, got 72"),
        ({"lora": "alien.safetensors"}, "alien.safetensors"),
    ],
)
def test_what_does_not_fit_is_said_and_the_server_goes_on(comfy: Comfy, widgets: dict[str, Any], reason: str):
    (loras_folder(comfy) / "alien.safetensors").write_bytes(b"not a safetensors file")
    result = comfy.run(sampling(**widgets))
    assert (result.status, result.error_node) == ("error", "sample")
    assert reason in result.error
    assert comfy.run(sampling()).status == "success"


def test_a_model_that_cannot_be_loaded_is_said(comfy: Comfy):
    folder = comfy.base / "models" / "diffusers" / "broken"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    result = comfy.run(sampling() | {"pipeline": pipeline("diffusers/broken")})
    assert (result.status, result.error_node) == ("error", "pipeline")
    assert "is a NoSuchPipeline, for which there is no family" in result.error


def test_what_other_nodes_give_may_be_widgets(comfy: Comfy):
    given = {
        "words": node("PrimitiveString", value=PROMPT),
        "blocks": node("PrimitiveInt", value=0),
        "nothing": node("PrimitiveString", value=" "),
    }
    graph = sampling(prompt=["words", 0]) | given | {"pipeline": pipeline(swap_blocks=["blocks", 0])}
    assert shown(comfy, comfy.run(graph)) == shown(comfy, comfy.run(sampling()))
    result = comfy.run(sampling(prompt=["nothing", 0]) | given)
    assert (result.status, result.error_node) == ("error", "sample")
    assert "prompt must not be empty" in result.error


def test_memory_savers_change_nothing_of_the_picture(comfy: Comfy):
    saving = pipeline(text_encoders="offload", swap_blocks=1, vae_tiling=True)
    assert shown(comfy, comfy.run(sampling() | {"pipeline": saving})) == shown(comfy, comfy.run(sampling()))
