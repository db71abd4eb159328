"""Adapters added up: into one, exactly or at a lower rank, and into a base model's weights."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_transformers import make, output, pipeline_of, random_layers
from torch import Tensor
from typer.testing import CliRunner

from ngrpo_lora import gaussian_noise
from ngrpo_lora.adapters.header import read_adapter
from ngrpo_lora.adapters.loading import load_adapter
from ngrpo_lora.adapters.merging import merge
from ngrpo_lora.adapters.reading import Layer, read_adapter_file, read_metadata
from ngrpo_lora.adapters.report import describe, lines
from ngrpo_lora.adapters.writing import peft_metadata, save_tensors, state_dict
from ngrpo_lora.cli import app
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.records.files import digest
from ngrpo_lora.sampling.sampler import Sampler
from ngrpo_lora.sampling.settings import drawing_settings
from ngrpo_lora.world import EMBEDDED


def write(path: Path, family: str, seed: int, rank: int = 2, targets: str = "all") -> str:
    transformer = make(family)
    torch.manual_seed(seed)
    layers = random_layers(family, transformer, rank, targets)
    header = {"lora_adapter_metadata": peft_metadata(layers), "ss_base_model_version": family}
    save_tensors(path, state_dict(layers), header)
    return str(path)


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["merge", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*words: object) -> str:
    result = CliRunner().invoke(app, ["merge", *map(str, words)])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", ["sana", "sd3", "z_image"])
def test_the_exact_merge_is_the_weighted_sum_in_stock_diffusers(family: str, tmp_path: Path):
    """Of two ranks, one of them without feed-forward layers."""
    paths = [write(tmp_path / "a.safetensors", family, 1), write(tmp_path / "b.safetensors", family, 2, 3, "attention")]
    run(f"{paths[0]}:0.7", f"{paths[1]}:-0.4", "--output", tmp_path / "merged.safetensors")

    expected = make(family)
    for path, weight in zip(paths, (0.7, -0.4), strict=True):
        for name, layer in read_adapter_file(path).layers.items():
            module = expected.get_submodule(name)
            module.weight += weight * layer.delta().view_as(module.weight)
    actual = make(family)
    pipeline_of(family, actual).load_lora_weights(tmp_path / "merged.safetensors")
    assert relative_error(output(family, actual), output(family, expected)) <= 1e-6

    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        said = json.loads(file.metadata()["ngrpo_merged"])
    assert [(part["file"], part["weight"]) for part in said] == [("a.safetensors", 0.7), ("b.safetensors", -0.4)]
    assert len({part["sha256"] for part in said}) == 2


def test_a_lower_rank_is_the_best_there_is_and_its_error_is_told(tmp_path: Path):
    paths = [write(tmp_path / f"{seed}.safetensors", "sana", seed) for seed in (1, 2)]
    exact, sources = merge([(path, 1.0) for path in paths]), [(path, 1.0) for path in paths]
    assert (exact.error, merge(sources, 4).error) == (0, 0)
    lost = total = 0.0
    reduced = merge(sources, 3)
    for name, layer in exact.layers.items():
        u, s, v = torch.linalg.svd(layer.delta().double(), full_matrices=False)
        best = (u[:, :3] * s[:3] @ v[:3]).float()
        assert reduced.layers[name].rank == 3
        assert relative_error(reduced.layers[name].delta(), best) <= 1e-5
        lost, total = lost + s[3:].square().sum().item(), total + s.square().sum().item()
    assert 0.05 < reduced.error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    printed = run(*paths, "--rank", 3, "--output", tmp_path / "x.safetensors")
    assert printed == f"{tmp_path / 'x.safetensors'}: relative error {reduced.error:.3g} at rank 3\n"


@pytest.fixture(scope="module")
def embedded_adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    family = load_family(ModelConfig())
    torch.manual_seed(0)
    layers = random_layers("flux", family.transformer)
    layers = {name: Layer(0.3 * x.down, x.up) for name, x in layers.items()}
    path = tmp_path_factory.mktemp("embedded") / "adapter.safetensors"
    save_tensors(path, state_dict(layers), {"ss_base_model_version": "flux1"})
    return str(path)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_a_merged_base_has_the_adapters_velocity_within_its_rounding(
    dtype: torch.dtype, tolerance: float, embedded_adapter: str, tmp_path: Path
):
    base = "embedded"  # stored in bfloat16
    if dtype == torch.float32:
        base = str(shutil.copytree(EMBEDDED, tmp_path / "base"))
        weights = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file({name: w.to(dtype) for name, w in load_file(weights).items()}, weights, {"format": "pt"})
    run(f"{embedded_adapter}:0.5", "--base", base, "--output", tmp_path / "merged")
    family, merged = (load_family(ModelConfig(path=path)) for path in (base, str(tmp_path / "merged")))
    latents, text = gaussian_noise((1, *family.latent_shape), 0), family.encode(["a red star"])
    with torch.no_grad():
        bare = family.velocity(latents, 0.5, text)
        load_adapter(family, embedded_adapter, 0.5)
        expected = family.velocity(latents, 0.5, text)
        actual = merged.velocity(latents, 0.5, merged.encode(["a red star"]))
    assert relative_error(actual, expected) <= tolerance
    assert relative_error(bare, expected) > 20 * tolerance
    stored = load_file(tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_that_rounding_takes_is_told_with_what_is_left(
    dtype: torch.dtype, embedded_adapter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    base = shutil.copytree(EMBEDDED, tmp_path / "base")
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    before = {name: w.to(dtype) for name, w in load_file(weights).items()}
    save_file(before, weights, {"format": "pt"})
    changes = {f"{name}.weight": layer.delta() for name, layer in read_adapter_file(embedded_adapter).layers.items()}
    told: dict[float, list[str]] = {}
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        for strength in (0.0, 0.001, 1.0):
            caplog.clear()
            output = tmp_path / f"merged{strength}"
            run(f"{embedded_adapter}:{strength}", "--base", base, "--output", output)
            told[strength] = [text for text in caplog.messages if "rounding" in text]
            if strength == 0.001 and dtype == torch.bfloat16:
                after = load_file(output / weights.relative_to(base))
                pairs = [((after[k].double() - before[k].double()), strength * changes[k].double()) for k in changes]
                left = sum((got * wanted).sum() for got, wanted in pairs) / sum((w * w).sum() for _, w in pairs)
                assert 0 < left < 0.5
                start = f"{left:.0%} of what the adapters change is left in the bfloat16 numbers of {base}, the rest is"
                assert [text[: len(start)] for text in told.pop(strength)] == [start]
    assert not any(told.values())


def test_a_base_in_several_files_is_merged_file_by_file(embedded_adapter: str, tmp_path: Path):
    from diffusers import FluxTransformer2DModel

    shutil.copytree(EMBEDDED, tmp_path / "base")
    transformer: Any = FluxTransformer2DModel.from_pretrained(EMBEDDED, subfolder="transformer")
    shutil.rmtree(tmp_path / "base" / "transformer")
    transformer.save_pretrained(tmp_path / "base" / "transformer", max_shard_size="5MB")
    assert len([*(tmp_path / "base" / "transformer").glob("*.safetensors")]) > 1
    run(embedded_adapter, "--base", tmp_path / "base", "--output", tmp_path / "merged")
    merged = FluxTransformer2DModel.from_pretrained(tmp_path / "merged", subfolder="transformer").state_dict()
    for name, layer in read_adapter_file(embedded_adapter).layers.items():
        expected = transformer.get_submodule(name).weight + layer.delta()
        assert relative_error(merged[f"{name}.weight"], expected) <= 1e-7


def test_biases_are_summed_and_added_to_the_base_s(embedded_adapter: str, tmp_path: Path):
    layers = read_adapter_file(embedded_adapter).layers
    biases = {name: torch.randn(len(layer.up)) for name, layer in layers.items()}
    own = {name: replace(layer, bias=biases[name]) for name, layer in layers.items()}
    path = tmp_path / "biased.safetensors"
    save_tensors(path, state_dict(own), {"ss_base_model_version": "flux1"})
    run(f"{path}:0.5", f"{path}:0.25", embedded_adapter, "--output", tmp_path / "sum.safetensors")
    merged = read_adapter_file(tmp_path / "sum.safetensors").layers
    for name, bias in biases.items():
        torch.testing.assert_close(merged[name].folded_bias, 0.75 * bias)
    run(path, "--base", "embedded", "--output", tmp_path / "base")
    before, after = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        for folder in (EMBEDDED, tmp_path / "base")
    )
    name, bias = next(iter(biases.items()))
    expected = before[f"{name}.bias"].float() + bias
    torch.testing.assert_close(after[f"{name}.bias"].float(), expected, rtol=1e-2, atol=1e-2)


def test_what_cannot_be_merged_is_refused_in_one_line(embedded_adapter: str, tmp_path: Path):
    sd3, wan = (write(tmp_path / f"{family}.safetensors", family, 1) for family in ("sd3", "wan"))
    layers = {name: Layer(x.down.repeat(1, 2), x.up) for name, x in read_adapter_file(sd3).layers.items()}
    save_tensors(tmp_path / "wide.safetensors", state_dict(layers), {"ss_base_model_version": "sd3"})
    out = ("--output", tmp_path / "out.safetensors")
    assert "sd3.safetensors' is of sd3 and " in refuse(sd3, wan, *out)
    assert "is (32, 32) in" in refuse(sd3, tmp_path / "wide.safetensors", *out)
    assert "must be finite, got inf" in refuse(f"{sd3}:inf", *out)
    assert "is too large for float32, in 'transformer_blocks.0.attn.add_k_proj'" in refuse(f"{sd3}:1e39", *out)
    assert "is too large for float32" in refuse(f"{sd3}:1e38", f"{sd3}:3e38", *out)  # of finite matrices
    for place in (".", "..", tmp_path):
        message = refuse(sd3, "--output", place)
        assert f"--output '{place}' cannot be written: [Errno 21] Is a directory: '{place}'" in message
    dora = {name: replace(x, magnitude=torch.ones(len(x.up))) for name, x in read_adapter_file(sd3).layers.items()}
    save_tensors(tmp_path / "dora.safetensors", state_dict(dora), {"ss_base_model_version": "sd3"})
    assert "is a DoRA, which scales the base's own weights anew" in refuse(tmp_path / "dora.safetensors", *out)
    folder = ("--output", tmp_path / "folder")
    assert "layers are not there (blocks.0.attn1.to_k" in refuse(wan, "--base", "embedded", *folder)
    assert "holds no transformer/*.safetensors" in refuse(wan, "--base", "owner/name", *folder)
    assert "must be a new folder" in refuse(embedded_adapter, "--base", "embedded", "--output", tmp_path)
    shutil.copytree(EMBEDDED, tmp_path / "int8")
    weights = tmp_path / "int8" / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("half"))
    save_file({name: w.to(torch.int8) for name, w in load_file(weights).items()}, weights)
    assert "must not be quantised, but" in refuse(embedded_adapter, "--base", tmp_path / "int8", *folder)
    save_file({name: w.to(torch.float16) for name, w in load_file(weights.with_name("half")).items()}, weights)
    message = refuse(f"{embedded_adapter}:1e10", "--base", tmp_path / "int8", *folder)
    assert "the sum with the base is too large for torch.float16, in " in message
    assert not (tmp_path / "folder").exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.fixture
def distilled(embedded_adapter: str, tmp_path: Path) -> tuple[str, str]:
    """An adapter, and the file beside which it was trained at 0.5; nobody else's."""
    layers = {name: Layer(0.5 * x.down.flip(1), x.up) for name, x in read_adapter_file(embedded_adapter).layers.items()}
    fast, beside = str(tmp_path / "fast.safetensors"), str(tmp_path / "beside.safetensors")
    header = {"ss_base_model_version": "flux1", "lora_adapter_metadata": peft_metadata(layers)}
    save_tensors(Path(fast), state_dict(layers), header)
    own = {
        "model": ModelConfig(fuse={fast: 0.5}).model_dump(),
        "rollout": RolloutConfig().model_dump(),
        "fused": {fast: digest(Path(fast))},
    }
    layers = read_adapter_file(embedded_adapter).layers
    save_tensors(Path(beside), state_dict(layers), header | {"ngrpo": json.dumps(own)})
    return beside, fast


def drawn(adapter: str | None, strength: float = 1.0) -> Tensor:
    """The velocity as `ngrpo sample` has it, and so its pictures."""
    return velocity(Sampler(drawing_settings(adapter, None), adapter, strength).family)


def base_drawn(path: Path) -> Tensor:
    """The same of a model in a folder."""
    return velocity(load_family(ModelConfig(path=str(path))))


@torch.no_grad()
def velocity(family: BaseFamily) -> Tensor:
    return family.velocity(gaussian_noise((1, *family.latent_shape), 0), 0.5, family.encode(["a red star"]))


def merged_into(path: Path) -> list[dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ngrpo_merged"])


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("first", ["adapter", "file"])
def test_a_sum_with_what_an_adapter_works_beside_draws_as_the_two_and_takes_it_in_once(
    strength: float, first: str, distilled: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    beside, fast = distilled
    words = [f"{beside}:{strength}", f"{fast}:0.5"]
    path = str(tmp_path / "m.safetensors")
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        run(*words[:: 1 if first == "adapter" else -1], "--output", path)
    assert not caplog.messages
    assert read_adapter(path).model == ModelConfig()
    assert "fused" not in json.loads(read_metadata(path)["ngrpo"])
    assert "works beside" not in dict(lines(describe(path)))
    expected = drawn(beside, strength)
    assert relative_error(drawn(path), expected) <= 1e-5
    assert relative_error(drawn(None), expected) > 0.05
    run(path, "--output", tmp_path / "again.safetensors")  # what is in it is known from there on
    assert [part["file"] for part in merged_into(tmp_path / "again.safetensors")[0]["merged"]] == [
        Path(word.rpartition(":")[0]).name for word in words[:: 1 if first == "adapter" else -1]
    ]


def test_what_an_adapter_works_beside_is_merged_at_its_strength_or_left_out(
    distilled: tuple[str, str], embedded_adapter: str, tmp_path: Path
):
    beside, fast = distilled
    out = ("--output", tmp_path / "m.safetensors")
    said = refuse(beside, fast, *out)
    assert f"works beside {fast!r} at 0.5, so that file must be merged at that weight, got 1; give {fast}:0.5" in said
    assert not (tmp_path / "m.safetensors").exists()
    run(fast, "--output", tmp_path / "inner.safetensors")
    assert "at that weight, got 0.75; give" in refuse(beside, f"{tmp_path / 'inner.safetensors'}:0.75", *out)
    run(beside, f"{tmp_path / 'inner.safetensors'}:0.5", *out)
    assert read_adapter(tmp_path / "m.safetensors").model.fuse == {}
    run(embedded_adapter, beside, *out)  # without it the sum works beside it as before
    assert read_adapter(tmp_path / "m.safetensors").model.fuse == {fast: 0.5}
    assert json.loads(read_metadata(tmp_path / "m.safetensors")["ngrpo"])["fused"] == {fast: digest(Path(fast))}


def test_a_base_knows_all_that_was_ever_merged_into_it(
    distilled: tuple[str, str], embedded_adapter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    beside, fast = distilled
    run(f"{fast}:0.5", "--base", "embedded", "--output", tmp_path / "first")
    run(f"{embedded_adapter}:0.25", "--base", tmp_path / "first", "--output", tmp_path / "second")
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        run(beside, "--base", tmp_path / "second", "--output", tmp_path / "third")
        assert "in its weights" not in caplog.text
        run(f"{fast}:0.5", beside, "--base", tmp_path / "first", "--output", tmp_path / "more")
        run(f"{fast}:-0.5", "--base", tmp_path / "first", "--output", tmp_path / "less")
    said = f"{tmp_path / 'first'} has fast.safetensors in its weights at 0.5 already, which becomes "
    found = [text for text in caplog.messages if "in its weights" in text]
    assert found == [f"{said}{now}; leave it out, unless you mean to add to it" for now in ("1", "0")]
    (shard,) = (tmp_path / "third" / "transformer").glob("*.safetensors")
    assert [(part["file"], part["weight"]) for part in merged_into(shard)] == [
        ("fast.safetensors", 0.5),
        ("adapter.safetensors", 0.25),
        ("beside.safetensors", 1.0),
    ]


def test_a_base_without_what_an_adapter_works_beside_is_told_with_the_command_that_merges_both(
    distilled: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    beside, fast = distilled

    def told(*words: object) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ngrpo_lora"):
            run(*words)
        return [text for text in caplog.messages if "works beside" in text]

    (tmp_path / "with-2").mkdir()  # a place that is taken
    (message,) = told(f"{beside}:0.7", "--base", "embedded", "--output", tmp_path / "with", "--family", "flux")
    start, _, command = message.partition("; merge it too: ")
    assert start.endswith(f"works beside {fast}, which embedded has not taken in")
    program, verb, *words = shlex.split(command)
    assert (program, verb, words[0], words[1]) == ("ngrpo", "merge", f"{beside}:0.7", f"{fast}:0.5")
    assert told(*words) == []  # word for word
    assert relative_error(base_drawn(tmp_path / "with-3"), drawn(beside, 0.7)) <= 0.01
    assert told(fast, "--base", "embedded", "--output", tmp_path / "strong") == []
    (message,) = told(beside, "--base", tmp_path / "strong", "--output", tmp_path / "other")
    assert message.endswith(
        f"works beside {fast} at 0.5, which {tmp_path / 'strong'} has taken in at 1; its pictures may be worse there"
    )
    assert told(f"{fast}:0.5", "--base", "embedded", "--output", tmp_path / "first") == []
    assert told(beside, "--base", tmp_path / "first", "--output", tmp_path / "second") == []
    Path(fast).rename(tmp_path / "moved.safetensors")  # beside the adapter still
    (message,) = told(beside, "--base", "embedded", "--output", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    _, _, *words = shlex.split(message.partition("; merge it too: ")[2])
    assert told(*words) == []
    Path("moved.safetensors").unlink()
    (message,) = told(beside, "--base", "embedded", "--output", tmp_path / "gone")
    assert f"; put {fast} back there; merge it too: ngrpo merge " in message


def test_no_adapter_is_lost_to_its_own_merge(embedded_adapter: str):
    before = Path(embedded_adapter).read_bytes()
    assert "must not be one of the files" in refuse(f"{embedded_adapter}:0", "--output", embedded_adapter)
    assert Path(embedded_adapter).read_bytes() == before
