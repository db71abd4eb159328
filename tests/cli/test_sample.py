"""`ngrpo sample`, `info` and `export` as a user calls them, on the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FinishedRun
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_transformers import make, random_layers
from typer.testing import CliRunner

from ngrpo_lora.adapters.reading import read_adapter_file, read_metadata
from ngrpo_lora.adapters.report import describe
from ngrpo_lora.adapters.writing import save_tensors, state_dict
from ngrpo_lora.cli.app import app
from ngrpo_lora.records.pictures import collect, read_png_text
from ngrpo_lora.sampling.sampler import sample_images


@pytest.fixture(scope="module")
def adapter(finished_run: FinishedRun) -> Path:
    return finished_run.output_dir / "adapter" / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def doubled(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter, twice as strong and of nobody."""
    path = tmp_path_factory.mktemp("doubled") / "doubled.safetensors"
    save_file({key: 2 * x if "lora_B" in key else x for key, x in load_file(adapter).items()}, path)
    return path


def run(*words: object) -> list[str]:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def refuse(*words: object) -> str:
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("ngrpo: ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# sample


def test_one_picture_per_prompt_and_seed_each_as_if_drawn_alone(adapter: Path, tmp_path: Path):
    run_folder, out = adapter.parents[1], tmp_path / "new"
    words = ["--prompt", "a red star", "-p", "Two  hearts!", "--seed", 7, "--num-images", 2, "--strength", 0.5]
    shown = run("sample", "--adapter", run_folder, *words, "--output", out)
    names = ["000-a-red-star-seed7", "000-a-red-star-seed8", "001-two-hearts-seed7", "001-two-hearts-seed8"]
    assert [Path(line).stem for line in shown] == names
    (expected,) = sample_images(adapter, None, ["Two  hearts!"], [8], strength=0.5)
    assert np.array_equal(pixels(shown[3]), np.asarray(expected))
    assert [picture.prompt for picture in collect([out])] == ["a red star"] * 2 + ["Two  hearts!"] * 2


def test_a_picture_says_how_it_was_drawn_and_like_draws_it_again_to_the_bit(
    adapter: Path, doubled: Path, tmp_path: Path
):
    words = ["-p", 'a "red" star → ☆', "--seed", 5, "--adapter", f"{adapter}:0.5", "--adapter", f"{doubled}:0.25"]
    words += ["--steps", 3, "--shift", 2.5, "--guidance", 1.5, "--solver", "euler", "--height", 48, "--width", 80]
    (first,) = run("sample", *words, "--output", tmp_path / "first")
    text = read_png_text(Path(first))
    own = json.loads(text["ngrpo"])
    assert (text["prompt"], text["seed"]) == ('a "red" star → ☆', "5")
    assert own["rollout"] == {"solver": "euler", "num_steps": 3, "shift": 2.5}
    size = {"path": "embedded", "height_px": 48, "width_px": 80, "guidance_scale": 1.5}
    assert size.items() <= own["model"].items()
    assert [one["strength"] for one in own["adapters"]] == [0.5, 0.25]
    assert [one["sha256"] for one in own["adapters"]] == [describe(path)["sha256"] for path in (adapter, doubled)]

    (again,) = run("sample", "--like", first, "--output", tmp_path / "again")
    assert Path(again).read_bytes() == Path(first).read_bytes()
    (other,) = run("sample", "--like", first, "--steps", 4, "--output", tmp_path / "other")
    assert not np.array_equal(pixels(other), pixels(first))
    changed = json.loads(read_png_text(Path(other))["ngrpo"])
    assert changed.pop("rollout") == own["rollout"] | {"num_steps": 4}
    assert changed == {key: value for key, value in own.items() if key != "rollout"}
    (weak,) = run("sample", "--like", first, "--strength", 0, "--output", tmp_path / "weak")
    (base,) = run("sample", "--like", first, "--adapter", f"{adapter}:0", "--output", tmp_path / "base")
    assert np.array_equal(pixels(weak), pixels(base))


def test_two_adapters_draw_together_as_their_sum(adapter: Path, doubled: Path, tmp_path: Path):
    words = ["-p", "a red star", "--seed", 3, "--output"]
    (together,) = run("sample", "--adapter", f"{adapter}:0.5", "--adapter", f"{doubled}:0.25", *words, tmp_path / "a")
    (alone,) = run("sample", "--adapter", adapter, *words, tmp_path / "b")
    (base,) = run("sample", *words, tmp_path / "c", "--steps", 4)
    assert abs(pixels(together) - pixels(alone)).max() <= 1
    assert abs(pixels(base) - pixels(alone)).max() > 1


def test_a_grid_has_prompts_and_seeds_by_base_and_adapters_and_each_cell_is_as_drawn_alone(
    adapter: Path, doubled: Path, tmp_path: Path
):
    (tmp_path / "prompts.txt").write_text("a red star\ntwo blue circles\nleft out\n")
    words = ["--prompts", tmp_path / "prompts.txt", "--num-prompts", 2, "--num-images", 2, "--grid", "--base-too"]
    words += ["--steps", 2]
    adapters = [f"{doubled}:0.5", str(doubled), str(adapter)]
    shown = run("sample", *words, *(x for one in adapters for x in ("--adapter", one)), "--output", tmp_path / "out")
    name = adapter.parents[1].name
    labels = ["base", "doubledx0.5", "doubled", name]
    rows = [(0, "a-red-star", 0), (0, "a-red-star", 1), (1, "two-blue-circles", 0), (1, "two-blue-circles", 1)]
    expected = [f"{row:03d}-{slug}-seed{seed}-{label}" for row, slug, seed in rows for label in labels]
    assert [Path(line).stem for line in shown] == [*expected, "grid"]
    with Image.open(shown[-1]) as sheet:
        assert sheet.width == 4 * 160
        assert sheet.height >= 4 * 160
    settings = ["-p", "two blue circles", "--seed", 1, "--steps", 2, "--output"]
    (base,) = run("sample", *settings, tmp_path / "base")
    (alone,) = run("sample", *settings, tmp_path / "alone", "--adapter", adapters[0])
    assert np.array_equal(pixels(shown[12]), pixels(base))
    assert np.array_equal(pixels(shown[13]), pixels(alone))
    assert not np.array_equal(pixels(alone), pixels(base))


def test_like_refuses_what_it_cannot_draw_again(adapter: Path, tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    out = ("--output", tmp_path / "out")
    assert "must be a PNG file that `ngrpo sample` wrote" in refuse("sample", "--like", tmp_path / "plain.png", *out)
    copy = Path(shutil.copy(adapter, tmp_path / "copy.safetensors"))
    (picture,) = run("sample", "--adapter", copy, "-p", "a star", "--steps", 2, *out)
    assert "must be finite, got inf for" in refuse("sample", "--like", picture, "--strength", "inf", *out)
    save_file({key: 2 * x for key, x in load_file(copy).items()}, copy)
    assert "copy.safetensors', which has changed since; give the one with --adapter" in refuse(
        "sample", "--like", picture, *out
    )
    copy.unlink()
    assert "copy.safetensors', which is not there any more" in refuse("sample", "--like", picture, *out)
    assert run("sample", "--like", picture, "--adapter", adapter, *out)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--steps", 1], "--steps Input should be greater than or equal to 2, got 1"),
        (["--height", 65], "--height must be a multiple of 16, got 65; the nearest are 64 and 80"),
        (["--solver", "heun"], "--solver Input should be 'dpmpp_2m' or 'euler', got 'heun'"),
        (["--strength", "nan"], "the strength of an adapter must be finite, got nan"),
        (["--prompts", "gone.txt"], "--prompts"),
        (["--adapter", "half.safetensors"], "is no readable safetensors file"),
        (["--adapter", "pickle.pt"], "is a pickle file"),
        (["--adapter", "two"], "holds a.safetensors and b.safetensors; give the file"),
        (["--adapter", "wan.safetensors"], "by its layers it is one of wan; give the model it was trained on"),
    ],
)
def test_bad_input_is_one_message(
    words: list[object], part: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("half.safetensors").write_bytes(adapter.read_bytes()[:5000])
    torch.save({}, "pickle.pt")
    Path("two").mkdir()
    for name in "ab":
        Path("two", f"{name}.safetensors").touch()
    save_tensors(Path("wan.safetensors"), state_dict(random_layers("wan", make("wan"))), {})
    own = ["--adapter", adapter] if "--strength" in words else []
    assert part in refuse("sample", "-p", "a star", *own, *words)


# info


def test_info_says_all_of_an_adapter_of_ours(adapter: Path, finished_run: FinishedRun):
    (said,) = json.loads("\n".join(run("info", adapter.parents[1], "--json")))
    assert said["family"] == "flux"
    assert said["base"] == "embedded"
    assert said["ranks"] == {"4": sum(said["layers"].values())}
    assert said["layers"] == {"attention": 14, "feed-forward": 8}
    assert said["alpha"] == {"scales": [1.0], "source": "header", "folded": True}
    assert said["readers"] == ["diffusers", "comfyui"]
    assert said["dtype"] == "float32"
    assert said["settings"]["num_steps"] == 4
    assert said["settings"]["shift"] == finished_run.run.family.shift(4)
    assert said["held_out"]["iteration"] == 4
    assert said["held_out"]["before"]["reward_mean"] != said["held_out"]["after"]["reward_mean"]
    deltas = torch.cat([layer.delta().double().flatten() for layer in read_adapter_file(adapter).layers.values()])
    assert said["norm"] == pytest.approx(deltas.norm().item(), rel=1e-5)
    assert run(*said["draw"].replace('"..."', "star").split()[1:], "--output", adapter.parents[1] / "drawn")
    shown = "\n".join(run("info", adapter))
    for part in ("trainer", "flux", "4 (22 layers)", "folded in", "14 attention, 8 feed-forward", "num_steps 4"):
        assert part in shown


def test_info_says_what_an_alpha_that_is_not_folded_does_to_whom(adapter: Path, tmp_path: Path):
    tensors = load_file(adapter)
    said = {}
    for name, header in {
        "none": {},
        "diffusers": {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})},
        "kohya": {"ss_network_dim": "4", "ss_network_alpha": "1"},
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", header)
        said[name] = describe(tmp_path / f"{name}.safetensors")["alpha"]
    assert said["none"]["advice"].startswith("taken to be the rank")
    assert (said["diffusers"]["scales"], said["kohya"]["scales"]) == ([2.0], [0.25])
    assert said["diffusers"]["advice"].startswith("diffusers applies it, ComfyUI does not")
    assert said["kohya"]["advice"].startswith("neither diffusers nor ComfyUI reads it there")
    assert "alpha / rank 2, from header" in "\n".join(run("info", tmp_path / "diffusers.safetensors"))


def test_info_tells_what_is_of_other_trainers_and_what_is_of_no_use_here(tmp_path: Path):
    pair = {"lora_down": torch.ones(2, 8), "lora_up": torch.ones(8, 2)}
    unet = {f"lora_unet_down_blocks_0_to_q.{part}.weight": tensor for part, tensor in pair.items()}
    save_file(unet, tmp_path / "unet.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    said = describe(tmp_path / "unet.safetensors")
    assert (said["trainer"], said["base"]) == ("kohya's sd-scripts or musubi-tuner", "sdxl_base_v1-0")
    assert "which is no flow model" in said["unusable"]
    layers = state_dict(random_layers("wan", make("wan")))
    save_file(layers, tmp_path / "wan.safetensors")
    said = describe(tmp_path / "wan.safetensors")
    assert (said["family"], said["readers"]) == ("wan", ["diffusers"])  # ComfyUI has no such names of Wan
    assert said["draw"].endswith('--model MODEL --prompt "..."')
    assert "diffusers; `ngrpo export --format comfyui` for comfyui" in "\n".join(run("info", said["file"]))
    save_file({"weight": torch.ones(1)}, tmp_path / "no.safetensors")
    assert "none of its keys is one of a LoRA (weight)" in refuse("info", tmp_path / "no.safetensors")


TEXT_LAYERS = {  # as kohya's sd-scripts, diffusers, older diffusers and PEFT write them
    "lora_te1": (
        "CLIP",
        "lora_te1_text_model_encoder_layers_{}_self_attn_q_proj.",
        ("lora_down.weight", "lora_up.weight"),
    ),
    "lora_te3": ("T5", "lora_te3_encoder_block_{}_layer_0_SelfAttention_q.", ("lora_down.weight", "lora_up.weight")),
    "text_encoder": (
        "CLIP",
        "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj.",
        ("lora_A.weight", "lora_B.weight"),
    ),
    "text_encoder_2": (
        "CLIP",
        "text_encoder_2.text_model.encoder.layers.{}.self_attn.q_proj.lora_linear_layer.",
        ("down.weight", "up.weight"),
    ),
    "text_encoder_3": ("unknown", "base_model.model.text_encoder_3.layers.{}.q.", ("lora_A.weight", "lora_B.weight")),
}


def text_layers(names: list[str], rank: int, count: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(count):
        for form, (down, up) in (TEXT_LAYERS[name][1:] for name in names):
            tensors |= {form.format(layer) + down: torch.ones(rank, 8), form.format(layer) + up: torch.ones(8, rank)}
            tensors |= {form.format(layer) + "alpha": torch.tensor(1.0)} if "lora_te" in form else {}
    return tensors


@pytest.mark.parametrize("names", [["lora_te1", "lora_te3"], ["text_encoder", "text_encoder_2", "text_encoder_3"]])
def test_info_counts_layers_of_text_encoders_which_nothing_else_takes(names: list[str], adapter: Path, tmp_path: Path):
    path = tmp_path / "both.safetensors"
    tensors, metadata = load_file(adapter), read_metadata(adapter)
    save_file(tensors | text_layers(names, 3, 5), path, metadata)
    said, own = describe(path), describe(adapter)
    found = {name: {"kind": TEXT_LAYERS[name][0], "layers": 5, "ranks": {"3": 5}} for name in names}
    assert said["text_encoders"] == found
    for key in ("family", "ranks", "layers", "norm", "alpha", "readers", "settings"):
        assert said[key] == own[key]
    assert "draw" not in said
    shown = "\n".join(" ".join(line.split()) for line in run("info", path))
    for name in names:
        assert f"text encoder {name} {TEXT_LAYERS[name][0]}; 5 layers of rank 3" in shown
    assert "rank 4 (22 layers)" in shown
    assert "cannot be used it adapts text encoders, which are left as they are here" in shown
    output = tmp_path / "x.safetensors"
    for words in (
        ["sample", "-p", "a star", "--adapter", path, "--output", tmp_path],
        ["merge", path, "--output", output],
        ["export", path, "--format", "comfyui", "--output", output],
    ):
        layers = ", ".join(f"5 layers of {name}" for name in sorted(names))
        assert f"it adapts text encoders too ({layers}), which are left as they are here" in refuse(*words)
    assert not output.exists()
    alone = tmp_path / "alone.safetensors"
    save_file(text_layers(names, 3, 5), alone)
    said = describe(alone)
    assert said["text_encoders"] == found
    assert not {"layers", "family", "draw"} & said.keys()
    assert "cannot be used" in "\n".join(run("info", alone))


# export


def test_export_writes_beside_the_adapter_and_the_run_still_draws_with_its_own(adapter: Path, tmp_path: Path):
    folder = Path(shutil.copytree(adapter.parents[1], tmp_path / "run"))
    (written,) = run("export", folder, "--format", "comfyui")
    assert Path(written) == folder / "adapter" / "pytorch_lora_weights-comfyui.safetensors"
    assert read_metadata(written)["ngrpo"] == read_metadata(adapter)["ngrpo"]
    words = ["-p", "a red star", "--output"]
    (own,) = run("sample", "--adapter", folder, *words, tmp_path / "own")
    (converted,) = run("sample", "--adapter", written, *words, tmp_path / "converted")
    assert np.array_equal(pixels(own), pixels(converted))
    assert "--format must be diffusers, comfyui or kohya, got 'a1111'" in refuse("export", folder, "--format", "a1111")
    assert "--format kohya needs the width of FLUX.1, 3072" in refuse("export", folder, "--format", "kohya")
