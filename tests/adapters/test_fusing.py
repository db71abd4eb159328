"""LoRA files that the frozen base takes in as it is loaded."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from diffusers import FluxPipeline
from refusing import message
from safetensors import safe_open
from tiny_transformers import make, random_layers
from torch import Tensor

from ngrpo_lora import gaussian_noise
from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.fusing import fuse, load_fused, python_lines
from ngrpo_lora.adapters.header import read_adapter
from ngrpo_lora.adapters.loading import load_adapter
from ngrpo_lora.adapters.merging import merge, merge_into_base
from ngrpo_lora.adapters.reading import Layer, read_adapter_file, read_metadata
from ngrpo_lora.adapters.report import describe, lines
from ngrpo_lora.adapters.writing import save_tensors, state_dict
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.planning.preflight import check_run, check_settings
from ngrpo_lora.records.files import digest
from ngrpo_lora.sampling.sampler import Sampler
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.world import ADAPTERS, EMBEDDED

PROMPT = "a red star"


def layers_of(family: str, seed: int, size: float = 0.3) -> dict[str, Layer]:
    transformer = load_family(ModelConfig()).transformer if family == "flux" else make(family)
    torch.manual_seed(seed)
    return {n: Layer(size * x.down, x.up) for n, x in random_layers(family, transformer).items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("fused")
    paths = [str(folder / f"{name}.safetensors") for name in ("few-steps", "style")]
    for seed, path in enumerate(paths):
        save_tensors(Path(path), state_dict(layers_of("flux", seed)), {"ss_base_model_version": "flux1"})
    return paths


@torch.no_grad()
def velocity(family: BaseFamily) -> Tensor:
    return family.velocity(gaussian_noise((1, *family.latent_shape), 0), 0.5, family.encode([PROMPT]))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("settings", [{}, {"swap_blocks": 2}, {"text_encoders": "offload"}])
def test_a_fused_base_draws_as_the_base_with_its_adapter_wherever_its_weights_are(
    settings: dict[str, object], files: list[str]
):
    expected = load_family(ModelConfig())
    bare = velocity(expected)
    load_adapter(expected, files[0], 0.5)
    fused = load_fused(ModelConfig.model_validate(settings | {"fuse": {files[0]: 0.5}}))
    assert relative_error(velocity(fused), velocity(expected)) <= 1e-5
    assert relative_error(bare, velocity(expected)) > 0.05


def test_several_files_are_the_sum_that_a_merged_base_has_to_the_bit(files: list[str], tmp_path: Path):
    """Of one file; of two the number type's rounding comes twice."""
    merge_into_base(merge([(files[0], 0.5)]), "embedded", tmp_path / "merged")
    merged = load_family(ModelConfig(path=str(tmp_path / "merged"), dtype="bfloat16"))
    fused = load_fused(ModelConfig(fuse={files[0]: 0.5}, dtype="bfloat16"))
    weights = fused.transformer.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in merged.transformer.state_dict().items())
    both = load_fused(ModelConfig(fuse={files[0]: 0.7, files[1]: -0.2})).transformer
    layers = [read_adapter_file(file).layers for file in files]
    base = load_family(ModelConfig()).transformer
    for name in layers[0]:
        expected = base.get_submodule(name).weight + 0.7 * layers[0][name].delta() - 0.2 * layers[1][name].delta()
        torch.testing.assert_close(both.get_submodule(name).weight, expected)


def test_an_adapter_is_trained_beside_what_its_base_has_taken_in(
    files: list[str], make_config: MakeConfig, tmp_path: Path
):
    """Its base is the fused one, its header says so, and stock diffusers draws as its card has it."""
    distilled = json.dumps({files[0]: 0.5})
    settings = ["optimizer.learning_rate=0.01", "algorithm.reference_weight=0.1", f"model.fuse={distilled}"]
    config = make_config(tmp_path / "run", *settings)
    check_run(config)
    run = prepare(config)
    complete(run)
    live = velocity(run.family)
    with lora.disabled(run.family.transformer):
        torch.testing.assert_close(velocity(run.family), velocity(load_fused(ModelConfig(fuse={files[0]: 0.5}))))
    path = tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"
    assert read_adapter(path).model.fuse == {files[0]: 0.5}
    assert json.loads(read_metadata(path)["ngrpo"])["fused"] == {files[0]: digest(Path(files[0]))}
    said = dict(lines(describe(path)))["works beside"]
    assert said.startswith(f"{files[0]} at 0.5")

    assert relative_error(velocity(Sampler(read_adapter(path), path).family), live) <= 1e-5
    family = load_family(read_adapter(path).model)  # whose pipeline is diffusers' own
    assert isinstance(family.pipeline, FluxPipeline)
    code = "\n".join(python_lines(read_adapter(path).model))
    assert f"path/to/{Path(files[0]).name}" in code
    (script := tmp_path / "fuse.py").write_text(code.replace(f"path/to/{Path(files[0]).name}", files[0]))
    runpy.run_path(str(script), {"pipeline": family.pipeline})
    alone = velocity(family)
    family.pipeline.load_lora_weights(str(path))
    assert relative_error(velocity(family), live) <= 1e-4 < relative_error(alone, live)


def test_a_file_of_the_hub_is_loaded_by_its_name_there():
    code = python_lines(ModelConfig(fuse={"owner/name/few-steps.safetensors": 1.0}))
    assert code[:2] == [
        "pipeline.load_lora_weights('owner/name', weight_name='few-steps.safetensors')",
        "pipeline.fuse_lora(lora_scale=1)  # into the base, as in training",
    ]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("owner/name", "'owner/name'"),
        ("owner/name/few/steps.safetensors", "'owner/name', weight_name='few/steps.safetensors'"),
        ("/home/steps.safetensors", "'path/to/steps.safetensors'"),
        ("/home/me/steps.safetensors", "'path/to/steps.safetensors'"),
    ],
)
def test_names_of_the_hub_are_told_from_places_of_this_machine(path: str, source: str):
    assert python_lines(ModelConfig(fuse={path: 1.0}))[0] == f"pipeline.load_lora_weights({source})"


def test_the_code_for_the_packages_own_lora_fuses_it_in_stock_diffusers(tmp_path: Path):
    """As the model card of a run on `embedded-turbo` has it; names and weights are those of the fused base."""
    pipeline = FluxPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    (script := tmp_path / "fuse.py").write_text("\n".join(python_lines(ModelConfig(fuse={"embedded-turbo": 0.5}))))
    runpy.run_path(str(script), {"pipeline": pipeline, "ADAPTERS": ADAPTERS})
    expected = load_fused(ModelConfig(fuse={"embedded-turbo": 0.5})).transformer.state_dict()
    found = pipeline.transformer.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
    plain = load_family(ModelConfig()).transformer.state_dict()
    assert any(not torch.allclose(plain[name], weight, atol=1e-3) for name, weight in expected.items())


def test_one_name_stands_for_the_whole_strength_and_a_file_is_written_down_absolute(
    files: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(files[0]).parent)
    assert ModelConfig.model_validate({"fuse": Path(files[0]).name}).fuse == {files[0]: 1.0}
    assert ModelConfig.model_validate({"fuse": "owner/name"}).fuse == {"owner/name": 1.0}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["model.fuse={a.safetensors: .nan}"], "model.fuse must be a finite number, got nan"),
        (["model.fuse={a.safetensors: .inf}"], "model.fuse must be a finite number, got .inf"),
        (["model.fuse={a.safetensors: strong}"], "model.fuse must be a number, got 'strong'"),
        (["model.fuse=a.safetensors", "model.quantization=nf4"], "model.fuse must be empty with a quantised base"),
        (["model.fuse=3"], "model.fuse must be"),
    ],
)
def test_strengths_are_numbers_and_the_base_is_not_quantised(settings: list[str], problem: str):
    assert message(*settings).startswith(problem)


def test_what_cannot_be_fused_is_said_before_a_model_loads(files: list[str], make_config: MakeConfig, tmp_path: Path):
    path = tmp_path / "other.safetensors"

    def problem(name: str) -> str:
        with pytest.raises(ConfigError) as error:
            check_settings(make_config(tmp_path / "run", f"model.fuse={name}"))
        (problem,) = error.value.problems
        return problem

    assert problem("gone.safetensors").startswith("model.fuse must be a LoRA file, ")
    path.write_bytes(b"no safetensors")
    assert re.match(r"model\.fuse: .*other\.safetensors", problem(str(path)))
    save_tensors(path, state_dict(layers_of("sd3", 0)), {"ss_base_model_version": "sd3"})
    assert problem(str(path)) == f"model.fuse must be LoRA files of 'embedded', but {str(path)!r} is of sd3"
    plain = read_adapter_file(files[0]).layers
    dora = {name: replace(layer, magnitude=torch.ones(len(layer.up))) for name, layer in plain.items()}
    save_tensors(path, state_dict(dora), {"ss_base_model_version": "flux1"})
    assert problem(str(path)).startswith(f"model.fuse {str(path)!r} is a DoRA")


def test_biases_are_added_and_a_bias_that_is_not_there_is_named(files: list[str], tmp_path: Path):
    plain = read_adapter_file(files[0]).layers
    own = {name: replace(layer, bias=torch.randn(len(layer.up))) for name, layer in plain.items()}
    path = tmp_path / "biased.safetensors"
    save_tensors(path, state_dict(own), {"ss_base_model_version": "flux1"})
    base, fused = load_family(ModelConfig()).transformer, load_fused(ModelConfig(fuse={str(path): 0.5})).transformer
    for name, layer in own.items():
        assert layer.bias is not None
        expected = base.get_submodule(name).bias + 0.5 * layer.bias
        torch.testing.assert_close(fused.get_submodule(name).bias, expected)
    name = next(iter(own))
    base.get_submodule(name).bias = None
    with pytest.raises(UserError, match=f"changes the bias of {name!r}, which has none in this model"):
        fuse(base, read_adapter_file(path), 1.0)


def test_a_sum_that_the_number_type_does_not_hold_is_refused(files: list[str]):
    with pytest.raises(UserError, match="the sum with the base is too large for torch.float16"):
        load_fused(ModelConfig(fuse={files[0]: 1e9}, dtype="float16"))


def test_the_embedded_model_stays_as_it_is(files: list[str]):
    load_fused(ModelConfig(fuse={files[0]: 1.0}))
    with safe_open(EMBEDDED / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        name = next(iter(read_adapter_file(files[0]).layers))
        weight = file.get_tensor(f"{name}.weight")
    torch.testing.assert_close(load_family(ModelConfig()).transformer.get_submodule(name).weight, weight.float())
