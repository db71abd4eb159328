"""Files that a run is made from, and that they are the same when it goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest
from PIL import Image

from ngrpo_lora.config import load_config
from ngrpo_lora.training.inputs import changed_inputs, input_files, warn_of_changes


def test_a_file_that_changed_is_named_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.csv", "x#y.csv", "own.py", "other.py"):
        Path(name).write_text("prompt\nx\n")
    (tmp_path / "adapter").mkdir()
    Path("adapter/pytorch_lora_weights.safetensors").write_text("")
    config = load_config(
        None,
        [
            "model.fuse={adapter: 0.5, owner/name: 1}",
            "prompts.train={a.txt: 1, b.csv#prompt: 2, world:train/color: 1, x#y.csv: 1}",
            "rewards=own.py:score",
            "evaluation.rewards=[other.py:score]",
            "evaluation.measures=[numpy:mean]",
        ],
    )
    assert {key: path.name for key, path in input_files(config).items()} == {
        f"model.fuse ({tmp_path / 'adapter'})": "pytorch_lora_weights.safetensors",
        "prompts.train (a.txt)": "a.txt",
        "prompts.train (b.csv#prompt)": "b.csv",
        "prompts.train (x#y.csv)": "x#y.csv",
        "rewards.train.0 (own.py:score)": "own.py",
        "evaluation.rewards.0 (other.py:score)": "other.py",
    }
    run = tmp_path / "run"
    warn_of_changes(config, run, resumed=False)
    warn_of_changes(config, run, resumed=True)
    assert caplog.text == ""
    Path("b.csv").write_text("prompt\ny\n")
    Path("own.py").write_text("changed")
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        warn_of_changes(config, run, resumed=False)
        assert caplog.text == ""
        Path("b.csv").write_text("prompt\nz\n")
        assert changed_inputs(config, run) == ["prompts.train (b.csv#prompt)"]
        warn_of_changes(config, run, resumed=True)
    assert changed_inputs(config, run) == []
    assert [record.args for record in caplog.records] == [("prompts.train (b.csv#prompt)",)]
    assert "prompts.train (b.csv#prompt) has changed since this run began" in caplog.text
    (run / "inputs.json").write_text("{")
    assert changed_inputs(config, run) == changed_inputs(config, tmp_path / "no run") == []
    warn_of_changes(config, run, resumed=True)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("source", ["edits.csv", "hf:./folder?source=image"])
def test_pictures_that_changed_are_counted_by_table_with_the_first(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (folder := tmp_path / "folder").mkdir()
    for name in "abc":
        Image.new("RGB", (48, 48), "red").save(folder / f"{name}.png")
    lines = [json.dumps({"file_name": f"{name}.png", "prompt": f"make it {name}"}) for name in "abc"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows = [f"make it {name},folder/{name}.png,folder/c.png" for name in "abc"]
    Path("edits.csv").write_text("\n".join(["prompt,source,mask", *rows]))
    settings = ["model.path=embedded-edit", f"prompts.held_out={source}", "prompts.train=edits:train"]
    config = load_config(None, [*settings, "evaluation.num_prompts=3"])
    key, run = f"pictures of prompts.held_out ({source})", tmp_path / "run"
    warn_of_changes(config, run, resumed=False)
    found = json.loads((run / "inputs.json").read_text())
    assert sorted(Path(name).name for name in found[key]) == ["a.png", "b.png", "c.png"]
    Image.new("RGB", (48, 48), "blue").save(folder / "c.png")
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        warn_of_changes(config, run, resumed=True)
    (record,) = caplog.records
    assert record.args is not None
    assert record.args[:3] == (key, 1, 3)
    assert "c.png': what follows is made with them as they are now" in record.getMessage()
    warn_of_changes(config, run, resumed=True)
    assert len(caplog.records) == 1


def test_pictures_that_only_a_longer_run_needs_have_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    for i in range(9):
        Image.new("RGB", (48, 48), "red").save(f"{i}.png")
    Path("edits.csv").write_text("\n".join(["prompt,source", *(f"make it {i},{i}.png" for i in range(9))]))
    counts = []
    for iterations, resumed in ((1, False), (4, True)):
        settings = ["prompts.train=edits.csv", f"trainer.num_iterations={iterations}"]
        config = load_config(None, ["model.path=embedded-edit", "rollout.prompts_per_iteration=2", *settings])
        warn_of_changes(config, tmp_path, resumed)
        counts.append(len(json.loads(Path("inputs.json").read_text())["pictures of prompts.train (edits.csv)"]))
    assert counts == [2, 8]
    assert caplog.text == ""
