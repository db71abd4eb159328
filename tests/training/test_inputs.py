"""Files that a run is made from, and that they are the same when it goes on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ngrpo_lora.config import load_config
from ngrpo_lora.training.inputs import input_files, warn_of_changes


def test_a_file_that_changed_is_named_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.csv", "own.py", "other.py"):
        Path(name).write_text("prompt\nx\n")
    (tmp_path / "adapter").mkdir()
    Path("adapter/pytorch_lora_weights.safetensors").write_text("")
    config = load_config(
        None,
        [
            "model.fuse={adapter: 0.5, owner/name: 1}",
            "prompts.train={a.txt: 1, b.csv#prompt: 2, world:train/color: 1}",
            "rewards=own.py:score",
            "evaluation.rewards=[other.py:score]",
            "evaluation.measures=[numpy:mean]",
        ],
    )
    assert {key: path.name for key, path in input_files(config).items()} == {
        f"model.fuse ({tmp_path / 'adapter'})": "pytorch_lora_weights.safetensors",
        "prompts.train (a.txt)": "a.txt",
        "prompts.train (b.csv#prompt)": "b.csv",
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
        warn_of_changes(config, run, resumed=True)
    assert [record.args for record in caplog.records] == [("prompts.train (b.csv#prompt)",)]
    assert "prompts.train (b.csv#prompt) has changed since this run began" in caplog.text
    (run / "inputs.json").write_text("{")
    warn_of_changes(config, run, resumed=True)
    assert len(caplog.records) == 1
