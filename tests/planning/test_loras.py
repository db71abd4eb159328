"""LoRA files that a run starts from, which are checked before its model loads."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from conftest import MakeConfig
from lora_files import rewrite
from safetensors.torch import load_file, save_file

from ngrpo_lora.adapters.merging import merge, merge_into_base
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.adapters.writing import save_tensors
from ngrpo_lora.config import ModelConfig, dump_config
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.planning.preflight import check_resumable, check_settings
from ngrpo_lora.records.files import digest
from ngrpo_lora.training.inputs import warn_of_changes
from ngrpo_lora.world import EMBEDDED_TURBO


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch):
    """No model is loaded."""
    monkeypatch.setattr(BaseFamily, "load", lambda *_: pytest.fail("a model was loaded"))


@pytest.fixture
def problems(make_config: MakeConfig, tmp_path: Path):
    def found(*settings: str) -> list[str]:
        try:
            check_settings(make_config(tmp_path / "run", *settings))
        except ConfigError as error:
            return [*error.problems]
        return []

    return found


@pytest.fixture(scope="module")
def turbo_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model with its distillation in its weights."""
    output = tmp_path_factory.mktemp("merged") / "base"
    merge_into_base(merge([("embedded-turbo", 0.5)]), "embedded", output)
    return str(output)


def test_one_file_under_several_names_is_refused(problems, adapter: Path, tmp_path: Path):
    run = adapter.parents[1]
    copy = shutil.copy(adapter, tmp_path / "copy.safetensors")
    for first, second in ((run, run / "adapter"), (adapter, copy), ("embedded-turbo", EMBEDDED_TURBO)):
        (said,) = problems(f"model.fuse={json.dumps({str(first): 1.0, str(second): 0.5})}")
        assert said == (
            f"model.fuse must name each file once, got {str(first)!r} and {str(second)!r}, which is the same file; "
            "give one of them, with the sum of the strengths"
        )
    merged = merge([("embedded-turbo", 1.0), (str(adapter), 0.5)])
    save_tensors(tmp_path / "sum.safetensors", merged.tensors(), merged.metadata)
    (said,) = problems(f"model.fuse=[{tmp_path / 'sum.safetensors'}, {adapter}]")
    assert f"got {str(adapter)!r} and '{tmp_path / 'sum.safetensors'}', which was merged from it; give" in said
    assert problems(f"model.fuse=[embedded-turbo, {adapter}]") == []


def test_a_file_that_the_base_has_in_its_weights_is_refused(
    problems, turbo_base: str, adapter: Path, make_config: MakeConfig, tmp_path: Path
):
    path, name = f"model.path={turbo_base}", "pytorch_lora_weights.safetensors"
    assert problems(path, "model.fuse=embedded-turbo") == [
        f"model.fuse must not hold what the base has in its weights, but {turbo_base!r} was merged with {name!r} at "
        "0.5 already, and 'embedded-turbo' would count twice; drop model.fuse"
    ]
    (said,) = problems(path, f"model.fuse=[{adapter}, {EMBEDDED_TURBO}]")
    assert said.endswith(f"and {str(EMBEDDED_TURBO)!r} would count twice; drop {str(EMBEDDED_TURBO)!r} from model.fuse")
    merged = merge([(str(adapter), 0.3)])
    save_tensors(tmp_path / "inner.safetensors", merged.tensors(), merged.metadata)
    merge_into_base(merge([(str(tmp_path / "inner.safetensors"), 0.5)]), turbo_base, tmp_path / "both")
    (said,) = problems(f"model.path={tmp_path / 'both'}", f"model.fuse={adapter}")  # through another file
    assert f"was merged with {name!r} at 0.15 already" in said
    assert problems(path) == problems("model.fuse=embedded-turbo") == problems(path, f"model.fuse={adapter}") == []
    # A run that has begun so goes on so: its settings must not change.
    assert problems(path, "model.fuse=embedded-turbo", "resume=latest") == []


def test_an_adapter_to_start_from_that_lacks_its_base_is_told_once(
    problems, turbo_base: str, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (sha256,) = (digest(file) for file in EMBEDDED_TURBO.glob("*.safetensors"))
    own = json.loads(read_metadata(adapter)["ngrpo"]) | {"fused": {"embedded-turbo": sha256}}
    own["model"] = ModelConfig(fuse={"embedded-turbo": 0.5}).model_dump()
    beside = rewrite(adapter, tmp_path / "beside.safetensors", ngrpo=json.dumps(own))
    initial = f"lora.init_from={beside}"
    said = f"adapter {beside} works beside embedded-turbo, which"
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        assert problems(initial) == []
        assert caplog.messages == [f"{said} embedded has not taken in; give it in model.fuse too"]
        caplog.clear()
        assert problems(initial, "model.fuse=embedded-turbo:0.5") == problems(initial, f"model.path={turbo_base}") == []
        assert problems(initial, f"model.fuse={EMBEDDED_TURBO}:0.5") == problems(initial, "resume=latest") == []
        assert caplog.messages == []
        assert len(problems(initial, "model.fuse=gone.safetensors")) == 1


def test_a_file_that_was_moved_is_asked_for_and_a_resumed_run_takes_it_from_there(
    problems, make_config: MakeConfig, adapter: Path, tmp_path: Path
):
    old, new, run = tmp_path / "old.safetensors", tmp_path / "new.safetensors", tmp_path / "run"
    shutil.copy(adapter, old)
    run.mkdir()
    begun = make_config(run, f"model.fuse={{{old}: 0.5, embedded-turbo: 1}}")
    warn_of_changes(begun, run, resumed=False)
    (run / "config.yaml").write_text(dump_config(begun))
    old.rename(new)
    (said,) = problems(f"model.fuse={old}")
    assert said.endswith(f"but {str(old)!r} does not exist; put it there, or give the path that it has now")
    check_resumable(make_config(run, f"model.fuse={{{new}: 0.5, {EMBEDDED_TURBO}: 1}}"))
    for other in (f"{{{new}: 0.6, embedded-turbo: 1}}", f"{{{new}: 0.5}}", f"{{{adapter}: 0.5, gone.safetensors: 1}}"):
        with pytest.raises(ConfigError, match="a resumed run must keep its settings, but model.fuse"):
            check_resumable(make_config(run, f"model.fuse={other}"))
    save_file({key: 2 * x for key, x in load_file(new).items()}, new)
    with pytest.raises(ConfigError, match="a resumed run must keep its settings, but model.fuse"):
        check_resumable(make_config(run, f"model.fuse={{{new}: 0.5, embedded-turbo: 1}}"))
