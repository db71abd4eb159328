"""LoRA files that do not fit a run's model are told before its weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from safetensors.torch import save_file
from torch import Tensor

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.planning.fitting import unfitting
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.world import MODELS

FORM = "transformer.{}.lora_{}.weight"
QUERY = "transformer_blocks.0.attn.to_q"


@pytest.fixture(autouse=True)
def _unloaded(monkeypatch: pytest.MonkeyPatch):
    """No model is loaded."""
    monkeypatch.setattr(BaseFamily, "load", lambda *_: pytest.fail("a model was loaded"))


def written(
    path: Path, name: str, sides: tuple[int, int] = (128, 128), more: Mapping[str, Tensor] | None = None
) -> str:
    """A LoRA file of one layer with so many outputs and inputs."""
    tensors = {FORM.format(name, "A"): torch.randn(4, sides[1]), FORM.format(name, "B"): torch.randn(sides[0], 4)}
    save_file(tensors | dict(more or {}), path)
    return str(path)


@pytest.mark.parametrize("key", ["model.fuse", "lora.init_from"])
@pytest.mark.parametrize(
    ("name", "sides", "rule"),
    [
        (QUERY, (8, 8), f"is no LoRA of this model: {QUERY!r} is 8 x 8 there and 128 x 128 here"),
        ("transformer_blocks.99.attn.to_q", (128, 128), "1 of its 1 layers are not there"),
    ],
)
def test_a_file_that_does_not_fit_is_told_before_the_model_loads(
    key: str, name: str, sides: tuple[int, int], rule: str, make_config: MakeConfig, tmp_path: Path
):
    file = written(tmp_path / "a b.safetensors", name, sides)
    with pytest.raises(ConfigError) as error:
        check_run(make_config(tmp_path / "run", f"{key}={json.dumps(file)}"))
    (problem,) = error.value.problems
    assert problem.startswith(f"{key}: adapter {file!r} is no LoRA of this model: ")
    assert rule in problem
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_could_not_be_gone_on_with_is_told_before_the_model_loads(
    make_config: MakeConfig, tmp_path: Path
):
    biases = {f"transformer.{QUERY}.lora_B.bias": torch.ones(128)}
    cases = {
        written(tmp_path / "bias.safetensors", QUERY, more=biases): ("has biases beside its matrices", "attention"),
        written(tmp_path / "ff.safetensors", "transformer_blocks.0.ff.net.2", (128, 512)): (
            "adapts 1 layers that lora.targets leaves out",
            "attention",
        ),
    }
    for file, (rule, targets) in cases.items():
        (problem,) = unfitting(make_config(tmp_path, f"lora.init_from={file}", f"lora.targets={targets}"))
        assert problem.startswith(f"lora.init_from {file!r} {rule}")


def test_files_that_fit_are_checked_without_a_word(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = written(tmp_path / "good.safetensors", QUERY)
    assert [*unfitting(make_config(tmp_path, f"lora.init_from={file}", f"model.fuse={file}"))] == []
    assert [*unfitting(make_config(tmp_path))] == []
    bad = written(tmp_path / "bad.safetensors", QUERY, (8, 8))
    assert [*unfitting(make_config(tmp_path, f"lora.init_from={bad}", "resume=latest"))] == []
    assert not caplog.records


def test_a_model_whose_files_cannot_be_had_is_left_to_its_loading(make_config: MakeConfig, tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model_index.json").write_bytes((MODELS["embedded"] / "model_index.json").read_bytes())
    file = written(tmp_path / "bad.safetensors", QUERY, (8, 8))
    assert [*unfitting(make_config(tmp_path, f"lora.init_from={file}", f"model.path={base}"))] == []
