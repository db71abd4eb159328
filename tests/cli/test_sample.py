"""`ngrpo sample` as a user calls it, on the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refuse, run
from pictures import pixels
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_transformers import make, random_layers

from ngrpo_lora.adapters.report import describe
from ngrpo_lora.adapters.writing import save_tensors, state_dict
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.records.files import digest
from ngrpo_lora.records.pictures import collect, read_png_text
from ngrpo_lora.sampling.sampler import sample_images


@pytest.fixture(scope="module")
def doubled(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter, twice as strong and of nobody."""
    path = tmp_path_factory.mktemp("doubled") / "doubled.safetensors"
    save_file({key: 2 * x if "lora_B" in key else x for key, x in load_file(adapter).items()}, path)
    return path


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
    scored = run("score", tmp_path / "out", "--reward", "jpeg", "--output", tmp_path / "scores")
    assert f"| {len(expected)} | 0 |" in "\n".join(scored)  # the sheet is none of the pictures
    settings = ["-p", "two blue circles", "--seed", 1, "--steps", 2, "--output"]
    (base,) = run("sample", *settings, tmp_path / "base")
    (alone,) = run("sample", *settings, tmp_path / "alone", "--adapter", adapters[0])
    assert np.array_equal(pixels(shown[12]), pixels(base))
    assert np.array_equal(pixels(shown[13]), pixels(alone))
    assert not np.array_equal(pixels(alone), pixels(base))


# Bad input


@pytest.mark.usefixtures("nothing_heavy")
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--prompt", "a star", "--adapter", "gone.safetensors"], "'gone.safetensors' does not exist"),
        (["--prompt", "a star", "--adapter", "."], "holds no pytorch_lora_weights.safetensors"),
        (["--prompt", "  "], "--prompt must not be empty"),
        ([], "--prompt, --prompts or --like must be given"),
        (["--prompt", "a star", "--adapter", "x:nan"], "the strength of an adapter must be finite, got nan for 'x'"),
        (["--prompt", "a star", "--model", "flux"], "got 'flux'; did you mean black-forest-labs/FLUX.1-dev?"),
        (["--prompt", "a star", "--output", "file.txt"], "--output must be a writable folder"),
    ],
)
def test_sample_refuses_bad_input(words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    assert part in refuse("sample", *words)


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


def test_like_knows_the_files_that_the_base_has_taken_in(
    adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fused, beside, out = tmp_path / "fused.safetensors", tmp_path / "beside.safetensors", ("--output", tmp_path / "out")
    shutil.copy(adapter, fused)
    own = {
        "model": ModelConfig(fuse={str(fused): 0.5}).model_dump(),
        "rollout": RolloutConfig(num_steps=2).model_dump(),
        "fused": {str(fused): digest(fused)},
    }
    save_file(load_file(adapter), beside, {"ngrpo": json.dumps(own)})
    (picture,) = run("sample", "--adapter", beside, "-p", "a star", *out)
    before = Path(picture).read_bytes()
    (again,) = run("sample", "--like", picture, *out)
    assert Path(again).read_bytes() == before
    save_file({key: 2 * x for key, x in load_file(fused).items()}, fused)
    with caplog.at_level("WARNING", "ngrpo_lora"):
        run("sample", "--adapter", beside, "-p", "a star", "--output", tmp_path / "changed")
    assert f"model.fuse ({fused}) has changed since adapter {beside} was trained" in caplog.text
    said = refuse("sample", "--like", picture, *out)
    assert f"was drawn on a base with {str(fused)!r} in its weights, which has changed since; put the file back" in said


def test_a_file_of_the_base_is_taken_in_once_and_found_where_it_was_moved(
    adapter: Path, doubled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """On a base that has it merged in, beside the adapter, and nowhere; by the adapter, and by a picture's recipe."""
    fused, base = tmp_path / "fused.safetensors", tmp_path / "base"
    shutil.copy(doubled, fused)
    own = {
        "model": ModelConfig(fuse={str(fused): 0.5}, dtype="bfloat16").model_dump(),
        "rollout": RolloutConfig(num_steps=2).model_dump(),
        "fused": {str(fused): digest(fused)},
    }
    (tmp_path / "run").mkdir()
    beside = tmp_path / "run" / "beside.safetensors"
    save_file(load_file(adapter), beside, {"ngrpo": json.dumps(own)})
    run("merge", f"{fused}:0.5", "--base", "embedded", "--output", base)

    def drawn(*words: object) -> list[str]:
        caplog.clear()
        with caplog.at_level("WARNING", "ngrpo_lora"):
            names.extend(run("sample", "-p", "a star", *words, "--output", tmp_path / f"out{len(names)}"))
        return [text for text in caplog.messages if "alpha" not in text]

    names: list[str] = []
    left_out = f"model.fuse ({fused}) is left out, as {base} has it in its weights"
    moved = f"model.fuse ({fused}) is not there any more; {tmp_path / 'run' / 'f.safetensors'}, which is the same file"
    assert drawn("--adapter", beside) == []
    assert drawn("--adapter", beside, "--model", base) == [left_out]
    drawn("--like", names[0], "--model", base)
    assert json.loads(read_png_text(Path(names[1]))["ngrpo"])["fused"] == {}
    fused.rename(tmp_path / "run" / "f.safetensors")
    assert drawn("--adapter", beside) == drawn("--like", names[0]) == [f"{moved}, takes its place"]
    (tmp_path / "run" / "f.safetensors").rename(tmp_path / "far.safetensors")
    for words in (["--adapter", beside], ["--like", names[0]]):
        said = refuse("sample", "-p", "a star", *words, "--output", tmp_path / "none")
        assert f"{str(fused)!r} does not exist; put fused.safetensors back there, or beside the adapter" in said
    assert not (tmp_path / "none").exists()
    assert drawn("--adapter", beside, "--model", base) == [left_out]
    assert all(np.array_equal(pixels(name), pixels(names[0])) for name in names)  # the merge rounds as the base does


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--steps", 1], "--steps must be at least 2, got 1"),
        (["--height", 65], "--height must be a multiple of 16, got 65; the nearest are 64 and 80"),
        (["--solver", "heun"], "--solver must be 'dpmpp_2m' or 'euler', got 'heun'"),
        (["--guidance", -1], "--guidance must be at least 0, got -1.0"),
        (["--strength", "nan"], "the strength of an adapter must be finite, got nan"),
        (["--prompts", "gone.txt"], "--prompts"),
        (["--adapter", "half.safetensors"], "is no readable safetensors file"),
        (["--adapter", "pickle.pt"], "is a pickle file"),
        (["--adapter", "two"], "holds a.safetensors and b.safetensors; give the file"),
        (["--adapter", "wan.safetensors"], "by its layers it is one of wan"),
        (["--seed", 2**64], "--seed must be from 0 to 18446744073709551615, for 1 seeds from there on, got 1844674407"),
        (["--seed", 2**64 - 1, "--num-images", 2], "--seed must be from 0 to 18446744073709551614, for 2 seeds"),
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
    monkeypatch.setattr(BaseFamily, "load", lambda *_: pytest.fail("a model was loaded"))
    there = {*Path().iterdir()}
    assert part in refuse("sample", "-p", "a star", *own, *words)
    assert {*Path().iterdir()} == there
    assert part in refuse("sample", "-p", "a star", *own, *words, "--output", "new/folder")
    assert {*Path().iterdir()} == there
    Path("mine").mkdir()
    assert part in refuse("sample", "-p", "a star", *own, *words, "--output", "mine")
    assert Path("mine").is_dir()
