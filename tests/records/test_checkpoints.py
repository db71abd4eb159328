"""Checkpoints are complete or absent, and an unreadable one says so."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ngrpo_lora.errors import UserError
from ngrpo_lora.records import checkpoints, files


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

    def cut_off(partial: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, 2, {"iteration": 2}, keep=3, beside=cut_off)
    assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000001"]
    checkpoints.save(tmp_path, 2, {"iteration": 2}, keep=3)
    assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 2


def test_what_is_kept_besides_the_newest_stays(tmp_path: Path):
    for iteration in (1, 2, 3, 4):
        checkpoints.save(tmp_path, iteration, {"iteration": iteration}, keep=1, kept=frozenset({2}))
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["iteration-000002", "iteration-000004"]


def test_no_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="resume=latest needs a checkpoint in .*; there is none"):
        checkpoints.load("latest", tmp_path, "cpu")
    with pytest.raises(UserError, match="resume must be latest or the path of a checkpoint, but .*gone' is none"):
        checkpoints.load(str(tmp_path / "gone"), tmp_path, "cpu")


def test_auto_goes_on_where_there_is_something_to_go_on_with(tmp_path: Path):
    assert checkpoints.resolve("auto", tmp_path) is None
    checkpoints.save(tmp_path, 1, {"iteration": 1}, keep=3)
    assert checkpoints.resolve("auto", tmp_path) == "latest"
    assert [checkpoints.resolve(value, tmp_path) for value in (None, "latest", "x")] == [None, "latest", "x"]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x00nothing" * 50),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "one bit": flip,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("name", [checkpoints.STATE_FILE, checkpoints.TENSORS_FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for iteration in (1, 2):
        checkpoints.save(tmp_path, iteration, {"iteration": iteration, "a": torch.randn(1000)}, keep=3)
    DAMAGES[damage](checkpoints.checkpoint_dir(tmp_path, 2) / name)
    with caplog.at_level(logging.WARNING, "ngrpo_lora"):
        assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 1
    if (damage, name) != ("gone", checkpoints.STATE_FILE):  # then it looks like none
        assert "checkpoint iteration-000002 is damaged" in caplog.text
        with pytest.raises(UserError, match=r"iteration-000002' is damaged \(.*\); resume from an older one"):
            checkpoints.load(str(checkpoints.checkpoint_dir(tmp_path, 2)), tmp_path, "cpu")
    DAMAGES[damage](checkpoints.checkpoint_dir(tmp_path, 1) / checkpoints.TENSORS_FILE)
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged; give another output_dir"):
        checkpoints.load("latest", tmp_path, "cpu")


def test_one_of_a_later_format_asks_for_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 2)
        checkpoints.save(tmp_path, 1, {"iteration": 1}, keep=3)
    with pytest.raises(UserError, match="has format 2, this version reads 1; update ngrpo-lora"):
        checkpoints.load("latest", tmp_path, "cpu")


def test_one_of_version_0_1_0_is_still_read(tmp_path: Path):
    folder = checkpoints.checkpoint_dir(tmp_path, 5)
    folder.mkdir(parents=True)
    torch.save({"iteration": 5, "a": torch.ones(3)}, folder / checkpoints.FORMER_FILE)
    for resume in ("latest", str(folder), str(folder / checkpoints.FORMER_FILE)):
        loaded = checkpoints.load(resume, tmp_path, "cpu")
        assert (loaded["iteration"], loaded["a"].tolist()) == (5, [1, 1, 1])
    (folder / checkpoints.FORMER_FILE).write_bytes(pickle.dumps(Foreign()))
    with pytest.raises(UserError, match="iteration-000005' is corrupt; resume from an older one"):
        checkpoints.load("latest", tmp_path, "cpu")


class Foreign:
    """Something that a checkpoint never holds."""


def test_without_room_nothing_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints.save(tmp_path, 1, {"iteration": 1}, keep=1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    words = r"no room on the disk for iteration-000002: .* has 1.0 MiB free, and it needs 4.8 MiB; .*resume=latest"
    with pytest.raises(UserError, match=words):
        checkpoints.save(tmp_path, 2, {"iteration": 2, "a": torch.zeros(1_000_000)}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000001"]


def test_going_back_drops_what_came_later(tmp_path: Path):
    for iteration in (2, 4, 6):
        checkpoints.save(tmp_path, iteration, {"iteration": iteration}, keep=9)
        for name in (f"evaluations/{iteration:06d}.jsonl", f"samples/{iteration:06d}.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    (tmp_path / "samples" / "first.png").touch()
    (tmp_path / "checkpoints" / ".iteration-000008.partial").mkdir()
    checkpoints.drop_after(tmp_path, 4)
    left = {folder.name: sorted(path.name for path in folder.iterdir()) for folder in tmp_path.iterdir()}
    assert left == {
        "checkpoints": ["iteration-000002", "iteration-000004"],
        "evaluations": ["000002.jsonl", "000004.jsonl"],
        "samples": ["000002.png", "000004.png", "first.png"],
    }


def test_copies_and_other_folders_are_no_checkpoints(tmp_path: Path):
    whole = checkpoints.save(tmp_path, 2, {"iteration": 2}, keep=3)
    for name in ("iteration-000009-backup", "iteration-000009 (copy)", "iteration-", "iteration-latest", "iteration-٣"):
        shutil.copytree(whole, whole.with_name(name))
    assert checkpoints.checkpoints(tmp_path) == [whole]
    assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 2
    checkpoints.drop_after(tmp_path, 1)
    assert (whole.with_name("iteration-000009-backup") / checkpoints.STATE_FILE).is_file()
    assert checkpoints.load(str(whole.with_name("iteration-000009-backup")), tmp_path, "cpu")["iteration"] == 2


def test_a_checkpoint_that_is_a_link_goes_and_what_it_leads_to_stays(tmp_path: Path):
    old = checkpoints.save(tmp_path / "elsewhere", 1, {"iteration": 1}, keep=1)
    link = checkpoints.checkpoint_dir(tmp_path, 1)
    link.parent.mkdir()
    link.symlink_to(old)
    assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 1
    checkpoints.save(tmp_path, 2, {"iteration": 2}, keep=1)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["iteration-000002"]
    assert (old / checkpoints.STATE_FILE).is_file()


def test_a_checkpoint_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    old = checkpoints.save(tmp_path, 1, {"iteration": 1}, keep=1)

    def busy(path: Path, **_: object) -> None:
        raise OSError(39, "Directory not empty", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, "rmtree", lambda path, **how: how or busy(path))
        checkpoints.save(tmp_path, 2, {"iteration": 2}, keep=1)
    assert f"checkpoint {old} could not be removed: [Errno 39] Directory not empty" in caplog.text
    assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 2


def test_a_checkpoint_says_its_iteration_whatever_its_folder_is_named(tmp_path: Path):
    folder = checkpoints.save(tmp_path, 7, {"iteration": 7}, keep=3)
    assert checkpoints.iteration_of(folder) == 7
    assert checkpoints.iteration_of(folder.rename(tmp_path / "best")) == 7
    for name, iteration in (("iteration-000005", 5), ("copy", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoints.FORMER_FILE).touch()
        assert checkpoints.iteration_of(tmp_path / name) == iteration
