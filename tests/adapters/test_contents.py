"""What LoRA files and bases hold already, and where files are that were moved."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from lora_files import rewrite
from safetensors.torch import save_file

from ngrpo_lora.adapters.contents import (
    contents,
    counted_twice,
    fused_digests,
    merged_before,
    settled,
    strengths,
    taken_in,
)
from ngrpo_lora.adapters.merging import merge, merge_into_base
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.adapters.writing import save_tensors
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.records.files import digest


def test_strengths_are_multiplied_through_files_and_added_up():
    inner = [{"sha256": "b", "file": "b", "weight": 0.5}, {"sha256": "c", "file": "c", "weight": -1}]
    entries = [
        {"sha256": "a", "file": "a", "weight": 2.0, "merged": inner},
        {"sha256": "b", "file": "b", "weight": 0.25},
        {"sha256": "d", "file": "d", "weight": 0.1},
        {"sha256": "d", "file": "d", "weight": -0.1},  # taken out again
    ]
    assert strengths(entries) == {"a": 2.0, "b": 1.25, "c": -2.0}
    junk = [3, {}, {"sha256": 3, "weight": 1}, {"sha256": "a", "weight": "1"}]
    assert strengths([*junk, {"sha256": "a", "weight": 1.0, "merged": 3}]) == {"a": 1.0}


def test_a_base_holds_what_was_merged_into_it_and_what_model_fuse_adds(adapter: Path, tmp_path: Path):
    merged = merge([(str(adapter), 0.5), ("embedded-turbo", 1.0)])
    save_tensors(tmp_path / "sum.safetensors", merged.tensors(), merged.metadata)
    merge_into_base(merge([(str(tmp_path / "sum.safetensors"), 0.5)]), "embedded", tmp_path / "base")
    turbo = {sha256 for sha256, strength in contents(tmp_path / "sum.safetensors").items() if strength == 1.0}
    own, whole = digest(adapter), digest(tmp_path / "sum.safetensors")
    assert len(turbo) == 2
    assert whole in turbo
    (turbo,) = turbo - {whole}
    assert [*contents(tmp_path / "sum.safetensors").items()] == [(whole, 1.0), (own, 0.5), (turbo, 1.0)]
    model = ModelConfig(path=str(tmp_path / "base"), fuse={"embedded-turbo": 0.25})
    assert taken_in(model) == {whole: 0.5, own: 0.25, turbo: 0.75}
    for other in ("embedded", "owner/name", str(tmp_path)):
        assert merged_before(other) == []
    next((tmp_path / "base" / "transformer").glob("*.safetensors")).write_bytes(b"damaged")
    assert merged_before(str(tmp_path / "base")) == []


def test_names_of_one_file_are_one_pair_and_a_sum_holds_its_parts():
    inside = {"one": {"a": 1.0}, "same": {"a": 1.0}, "sum": {"s": 1.0, "b": 0.5}, "part": {"b": 1.0}, "other": {"c": 1}}
    assert [*counted_twice(inside)] == [("one", "same"), ("part", "sum")]


@pytest.fixture
def moved(adapter: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run's adapter, and where the file was that it was trained beside."""
    fused = Path(shutil.copy(adapter, tmp_path / "fused.safetensors"))
    save_file({}, tmp_path / "empty.safetensors")
    (folder := tmp_path / "run" / "adapter").mkdir(parents=True)
    own = json.loads(read_metadata(adapter)["ngrpo"]) | {"fused": {str(fused): digest(fused)}}
    own["model"]["fuse"] = {str(fused): 0.5}
    return rewrite(adapter, folder / "pytorch_lora_weights.safetensors", ngrpo=json.dumps(own)), fused


@pytest.mark.parametrize("place", ["adapter/fused.safetensors", "fused.safetensors", "adapter/renamed.safetensors"])
def test_a_file_that_was_moved_is_found_beside_the_adapter(
    place: str, moved: tuple[Path, Path], caplog: pytest.LogCaptureFixture
):
    beside, fused = moved
    model, digests = ModelConfig(fuse={str(fused): 0.5}), fused_digests(read_metadata(beside))
    run = beside.parents[1]
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        assert settled(model, digests, [beside]) == model
        assert caplog.messages == []
        shutil.copy(run.parent / "empty.safetensors", run / "adapter" / "another.safetensors")  # of another digest
        fused.rename(run / place)
        assert settled(model, digests, [beside]).fuse == {str(run / place): 0.5}
    assert caplog.messages == [
        f"model.fuse ({fused}) is not there any more; {run / place}, which is the same file, takes its place"
    ]


def test_a_file_that_is_nowhere_is_asked_for(moved: tuple[Path, Path]):
    beside, fused = moved
    model, digests = ModelConfig(fuse={str(fused): 0.5}), fused_digests(read_metadata(beside))
    fused.unlink()
    gone = f"but {str(fused)!r} does not exist; put fused.safetensors back there"
    start = f"model.fuse must be a LoRA file, a run's .* {gone}"
    with pytest.raises(ConfigError, match=f"^{start}, or beside the adapter$"):
        settled(model, digests, [beside])
    with pytest.raises(ConfigError, match=f"^{start}$"):  # nothing says what it was
        settled(model, {}, [beside])
    hub = ModelConfig(fuse={"owner/name/file.safetensors": 1.0, "embedded-turbo": 1.0})
    assert settled(hub, {}, [beside]) == hub


def test_another_base_that_holds_a_file_needs_it_no_more(moved: tuple[Path, Path], tmp_path: Path):
    beside, fused = moved
    merge_into_base(merge([(str(fused), 0.5)]), "embedded", tmp_path / "base")
    digests = fused_digests(read_metadata(beside))
    model = ModelConfig(path=str(tmp_path / "base"), fuse={str(fused): 0.5, "embedded-turbo": 1.0})
    assert settled(model, digests, [beside], "embedded").fuse == {"embedded-turbo": 1.0}
    assert settled(model, {}, [beside], "embedded").fuse == {"embedded-turbo": 1.0}
    # What was trained so, on the very base, is drawn so.
    assert settled(model, digests, [beside], str(tmp_path / "run" / ".." / "base")) == model
    fused.unlink()
    assert settled(model, digests, [beside], "embedded").fuse == {"embedded-turbo": 1.0}
