"""Adapters that do not fit a model are refused before anything of it is loaded."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from lora_files import rewrite
from safetensors.torch import load_file, save_file
from tiny_transformers import make, random_layers

from ngrpo_lora.adapters.matching import check_adapters
from ngrpo_lora.adapters.merging import merge, merge_into_base
from ngrpo_lora.adapters.reading import Layer, read_adapter_file, read_metadata
from ngrpo_lora.adapters.writing import save_tensors, state_dict
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.models import _blueprint
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.records.files import digest

FLUX = ModelConfig(path="black-forest-labs/FLUX.1-dev")


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch):
    """No model is loaded, and no network asked."""
    monkeypatch.setattr(BaseFamily, "load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("ngrpo_lora.models._index.download", lambda *_: pytest.fail("a network was asked"))


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "wan.safetensors", state_dict(random_layers("wan", make("wan"))), {})
    return tmp_path / "wan.safetensors"


def test_an_adapter_of_the_model_passes(adapter: Path):
    check_adapters(ModelConfig(), [adapter, adapter])
    check_adapters(FLUX, [])


def test_another_family_and_another_size_are_refused(adapter: Path, wan: Path, tmp_path: Path):
    for model in (ModelConfig(), FLUX):
        with pytest.raises(UserError, match=r"wan\.safetensors' is no LoRA of this model: .* it is one of wan; give a"):
            check_adapters(model, [wan])
    with pytest.raises(UserError, match="is no LoRA of this model: .* and 3072 x 3072 here; .* a flux of another size"):
        check_adapters(FLUX, [adapter])
    layers = {name: Layer(x.down.repeat(1, 2), x.up) for name, x in read_adapter_file(adapter).layers.items()}
    save_tensors(tmp_path / "wide.safetensors", state_dict(layers), {})
    with pytest.raises(UserError, match=r"wide\.safetensors' is no LoRA of this model"):
        check_adapters(ModelConfig(), [adapter, tmp_path / "wide.safetensors"])


def test_a_folder_is_known_by_its_configuration(adapter: Path, wan: Path, tmp_path: Path):
    shutil.copytree(
        _blueprint.MODELS["embedded"], tmp_path / "base", ignore=lambda _, names: [n for n in names if "safetens" in n]
    )
    model = ModelConfig(path=str(tmp_path / "base"))
    check_adapters(model, [adapter])
    with pytest.raises(UserError, match="is no LoRA of this model"):
        check_adapters(model, [wan])


def test_different_bases_are_said_once(adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    own = json.loads(read_metadata(adapter)["ngrpo"])
    own["model"]["path"] = "owner/other"
    other = rewrite(adapter, tmp_path / "other.safetensors", ngrpo=json.dumps(own))
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        check_adapters(ModelConfig(), [adapter, other, adapter])
    assert [message.partition(" (")[0] for message in caplog.messages] == ["adapters were trained on different bases"]


def test_a_file_of_the_base_that_has_changed_is_said(adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fused = Path(shutil.copy(adapter, tmp_path / "fused.safetensors"))
    model = ModelConfig(fuse={str(fused): 0.5})
    own = json.loads(read_metadata(adapter)["ngrpo"]) | {"fused": {str(fused): digest(fused), "gone": "0"}}
    own["model"]["fuse"] = {str(fused): 0.5}
    beside = rewrite(adapter, tmp_path / "beside.safetensors", ngrpo=json.dumps(own))
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        check_adapters(model, [beside])
        assert caplog.messages == []
        save_file({key: 2 * x for key, x in load_file(fused).items()}, fused)
        check_adapters(model, [beside])
    (message,) = caplog.messages
    assert message == (
        f"model.fuse ({fused}) has changed since adapter {beside} was trained: what follows is drawn with the file as "
        "it is now"
    )


def test_an_adapter_that_the_base_has_taken_in_already_is_said(
    adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fused = shutil.copy(adapter, tmp_path / "fused.safetensors")
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        check_adapters(ModelConfig(fuse={str(fused): 1.0}), [adapter])
    (message,) = caplog.messages
    assert message == f"adapter {adapter} is in the base already (model.fuse: {fused}), and counts twice; leave it out"


def test_what_a_base_holds_by_a_merge_is_said_as_it_is(adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fused, base = Path(shutil.copy(adapter, tmp_path / "fused.safetensors")), str(tmp_path / "base")
    merge_into_base(merge([(str(fused), 0.5)]), "embedded", tmp_path / "base")
    own = json.loads(read_metadata(adapter)["ngrpo"]) | {"fused": {str(fused): digest(fused)}}
    own["model"]["fuse"] = {str(fused): 0.5}
    beside = rewrite(adapter, tmp_path / "beside.safetensors", 0.5, ngrpo=json.dumps(own))
    merged = merge([(str(beside), 1.0), (str(fused), 0.5)])
    save_tensors(tmp_path / "sum.safetensors", merged.tensors(), merged.metadata)

    def said(model: ModelConfig, *adapters: Path) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ngrpo_lora"):
            check_adapters(model, adapters)
        return caplog.messages

    left_out = f"model.fuse ({fused}) is left out, as {base} has it in its weights"
    assert said(ModelConfig(path=base), beside) == [left_out]
    other = rewrite(beside, tmp_path / "other.safetensors", 0.2)
    assert said(ModelConfig(path=base), beside, other) == [left_out]  # once
    twice = f"is in the base already (merged into {base}), and counts twice; leave it out"
    assert said(ModelConfig(path=base), adapter) == [f"adapter {adapter} {twice}"]
    (message,) = said(ModelConfig(path=base), tmp_path / "sum.safetensors")
    assert message.endswith(
        f"holds fused.safetensors, which is in the base already (merged into {base}), and counts twice; draw on a base "
        "without it"
    )
    assert said(ModelConfig(), tmp_path / "sum.safetensors") == []
    again = shutil.copy(fused, tmp_path / "again.safetensors")
    assert f"model.fuse ({fused}) is in model.fuse ({again}) too, and counts twice" in said(
        ModelConfig(fuse={str(fused): 0.25, str(again): 0.25}), beside
    )
