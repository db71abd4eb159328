"""Checkpoints are complete or absent, and an unreadable one says so."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from ngrpo_lora.errors import UserError
from ngrpo_lora.records import checkpoints


def test_what_is_saved_is_loaded(tmp_path: Path):
    state = {
        "iteration": 3,
        "parameters": {"a": torch.randn(4)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
    }
    folder = checkpoints.save(tmp_path, 3, state, keep=2)
    assert folder == checkpoints.checkpoint_dir(tmp_path, 3)
    assert list(folder.parent.iterdir()) == [folder]
    for resume in ("latest", str(folder), str(folder / checkpoints.STATE_FILE)):
        loaded = checkpoints.load(resume, tmp_path, "cpu")
        assert loaded["iteration"] == 3
        assert torch.equal(loaded["parameters"]["a"], state["parameters"]["a"])
        assert loaded["optimizer"] == state["optimizer"]


def test_only_the_newest_are_kept_by_their_number(tmp_path: Path):
    for iteration in (2, 10, 100, 5, 1_000_000):
        checkpoints.save(tmp_path, iteration, {"iteration": iteration}, keep=2)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["iteration-000100", "iteration-1000000"]
    assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 1_000_000


def test_saving_again_replaces(tmp_path: Path):
    checkpoints.save(tmp_path, 1, {"iteration": 1, "value": 1}, keep=3)
    checkpoints.save(tmp_path, 1, {"iteration": 1, "value": 2}, keep=3)
    assert checkpoints.load("latest", tmp_path, "cpu")["value"] == 2


def test_a_save_that_was_cut_off_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints.save(tmp_path, 1, {"iteration": 1}, keep=3)

    def cut_off(state: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(tmp_path, 2, {"iteration": 2}, keep=3)
    assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 1
    checkpoints.save(tmp_path, 2, {"iteration": 2}, keep=3)
    assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 2


def test_no_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="resume=latest needs a checkpoint in .*; there is none"):
        checkpoints.load("latest", tmp_path, "cpu")
    with pytest.raises(UserError, match="gone' cannot be read"):
        checkpoints.load(str(tmp_path / "gone"), tmp_path, "cpu")


class Foreign:
    """Something that a checkpoint never holds."""


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "foreign"])
def test_a_damaged_checkpoint_is_an_error(damage: str, tmp_path: Path):
    file = checkpoints.save(tmp_path, 1, {"iteration": 1, "a": torch.randn(1000)}, keep=3) / checkpoints.STATE_FILE
    content = {"empty": b"", "garbage": b"\x00nothing" * 50, "truncated": file.read_bytes()[:2000]}
    file.write_bytes(content[damage] if damage in content else pickle.dumps(Foreign()))
    with pytest.raises(UserError, match=r"iteration-000001' (cannot be read .*|is corrupt); resume from an older one"):
        checkpoints.load("latest", tmp_path, "cpu")
