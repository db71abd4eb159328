"""What is compared under which name, and what of it is drawn anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lora_files import rewrite

from ngrpo_lora.adapters.merging import merge, merge_into_base
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation import comparison
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.records.files import digest
from ngrpo_lora.records.pictures import Picture, collect
from ngrpo_lora.sampling import sampler, settings

PROMPTS = [Prompt("a red star", {"n": 1}), Prompt("a blue heart")]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts that were drawn."""
    seen: list[str] = []
    draw = sampler.draw

    def spy(family, text, seeds, *rest):
        seen.extend(map(str, seeds))
        return draw(family, text, seeds, *rest)

    monkeypatch.setattr(sampler, "draw", spy)
    return seen


def draw(adapter: Path | None, folder: Path, seeds: list[int]) -> list[Picture]:
    info = settings.drawing_settings(adapter, None, "cpu")
    return comparison.draw(comparison.Candidate("x", adapter, info), PROMPTS, seeds, folder)


def test_pictures_are_those_of_sample(adapter: Path, tmp_path: Path):
    pictures = draw(adapter, tmp_path, [5, 6])
    expected = sampler.sample_images(adapter, None, [PROMPTS[1].text], [6])[0]
    assert [picture.path.name for picture in pictures] == ["000-5.png", "001-6.png"]
    assert np.array_equal(pictures[1].load(), expected)
    assert pictures[0].metadata == {"n": 1}
    assert [picture.prompt for picture in collect([tmp_path])] == [prompt.text for prompt in PROMPTS]


def test_only_what_is_missing_or_of_other_weights_or_settings_is_drawn(
    adapter: Path, counted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def drawn(weights: Path | None, *seeds: int) -> list[str]:
        counted.clear()
        draw(weights, tmp_path / "pictures", list(seeds))
        return list(counted)

    assert drawn(None, 1, 2, 3, 4) == ["1", "2", "3", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "load_fused", lambda config: pytest.fail("a model was loaded"))
        assert drawn(None, 1, 2, 3, 4) == []
    (tmp_path / "pictures" / "001-3.png").unlink()
    torn = tmp_path / "pictures" / "001-4.png"
    torn.write_bytes(torn.read_bytes()[:60])
    assert drawn(None, 1, 2, 3, 4) == ["3", "4"]
    assert drawn(adapter, 1, 2, 3, 4) == ["1", "2", "3", "4"]
    other = tmp_path / "other.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    assert drawn(other, 1, 2, 3, 4) == ["1", "2", "3", "4"]


def test_candidates_are_named_by_run_or_file_and_never_alike(adapter: Path, tmp_path: Path):
    copies = [tmp_path / name for name in ("sky blue.safetensors", "base.safetensors", "deep/sky-blue.safetensors")]
    for copy in copies:
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(adapter.read_bytes())
    base, others = comparison.open_candidates([adapter, *copies], None, True, "cpu")
    found = [base, *others]
    run = adapter.parents[1].name
    assert [one.label for one in found] == ["base", run, "sky-blue", "base-2", "sky-blue-2"]
    assert [one.adapter for one in found] == [None, adapter, *copies]
    assert comparison.open_candidates([adapter, copies[0]], None, False, "cpu")[0].label == run
    with pytest.raises(ConfigError, match="twice or more with --no-base, got 1"):
        comparison.open_candidates([adapter], None, False, "cpu")


def test_adapters_that_draw_in_other_ways_are_not_compared(adapter: Path, tmp_path: Path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(adapter, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    own = json.loads(metadata["ngrpo"])
    own["rollout"]["num_steps"] = 9
    save_file(tensors, tmp_path / "nine.safetensors", metadata | {"ngrpo": json.dumps(own)})
    with pytest.raises(ConfigError, match="num_steps is 9 for nine and 4 for"):
        comparison.open_candidates([adapter, tmp_path / "nine.safetensors"], None, True, "cpu")


def test_adapters_of_another_model_are_refused_and_of_another_base_named(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(BaseFamily, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="is no LoRA of this model: .* and 3072 x 3072 here"):
        comparison.open_candidates([adapter], "black-forest-labs/FLUX.1-dev", True, "cpu")
    own = json.loads(read_metadata(adapter)["ngrpo"])
    own["model"]["path"] = "owner/other"
    other = rewrite(adapter, tmp_path / "other.safetensors", ngrpo=json.dumps(own))
    with pytest.raises(ConfigError, match="must draw alike to be compared, but path is owner/other for other and embe"):
        comparison.open_candidates([adapter, other], None, True, "cpu")
    comparison.open_candidates([adapter, other], "embedded", True, "cpu")
    assert f"{other} on owner/other)" in caplog.text


def test_adapters_whose_base_took_in_a_file_that_was_moved_draw_alike(
    adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Each run has its own copy of that file; or the model has it in its weights."""
    fused, own = tmp_path / "fused.safetensors", json.loads(read_metadata(adapter)["ngrpo"])
    own["model"]["fuse"], own["fused"] = {str(fused): 0.5}, {str(fused): digest(adapter)}
    adapters = []
    for name, factor in (("a", 1.0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        adapters.append(rewrite(adapter, tmp_path / name / f"{name}.safetensors", factor, ngrpo=json.dumps(own)))
        shutil.copy(adapter, tmp_path / name / "copy.safetensors")
    merge_into_base(merge([(str(adapter), 0.5)]), "embedded", tmp_path / "base")
    base, _ = comparison.open_candidates(adapters, None, True, "cpu")
    assert base.info.model.fuse == {str(tmp_path / "a" / "copy.safetensors"): 0.5}
    caplog.clear()
    base, _ = comparison.open_candidates(adapters, str(tmp_path / "base"), True, "cpu")
    assert base.info.model.fuse == {}
    assert caplog.text.count(f"({fused}) is left out, as {tmp_path / 'base'} has it in its weights") == 1


def test_prompts_are_all_different_and_as_many_as_there_are(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\none\nthree\n")
    found = comparison.distinct_prompts(str(tmp_path / "prompts.txt"), 10, 0)
    assert sorted(prompt.text for prompt in found) == ["one", "three", "two"]
    world = [prompt.text for prompt in comparison.distinct_prompts("world:held_out", 30, 7)]
    assert len(set(world)) == 30
    assert world[:5] == [prompt.text for prompt in comparison.distinct_prompts("world:held_out", 5, 7)]
