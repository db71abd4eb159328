"""Files that are there whole or not at all, and files told apart by their contents."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ngrpo_lora.errors import UserError
from ngrpo_lora.records import files
from ngrpo_lora.records.files import digest, disk_is_full, no_room, written, written_folder


def write_half(path: Path) -> None:
    with written(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt


def test_a_file_takes_its_place_when_it_is_whole_and_not_before(tmp_path: Path):
    path = tmp_path / "new" / "file.txt"
    with written(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    with written(path) as partial:
        partial.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert [*path.parent.iterdir()] == [path]


def test_a_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for place in (".", "..", str(tmp_path)):
        with pytest.raises(IsADirectoryError), written(Path(place)):
            pass
    assert not [*tmp_path.iterdir()]


def test_a_file_that_was_not_finished_leaves_the_one_before_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("one")
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert path.read_text() == "one"
    assert [*tmp_path.iterdir()] == [path]


def write_half_a_folder(path: Path) -> None:
    with written_folder(path) as partial:
        partial.mkdir()
        (partial / "half.txt").touch()
        raise KeyboardInterrupt


def test_a_folder_takes_the_place_of_another_as_a_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "folder"
    for name in ("one", "two"):
        with written_folder(path) as partial:
            partial.mkdir()
            (partial / name).touch()
    assert [file.name for file in path.iterdir()] == ["two"]
    with pytest.raises(KeyboardInterrupt):
        write_half_a_folder(path)
    assert [file.name for file in path.iterdir()] == ["two"]
    assert [*tmp_path.iterdir()] == [path]


def test_a_digest_is_that_of_the_contents(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_takes_a_place_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    replace, fsync = files.os.replace, files.os.fsync
    monkeypatch.setattr(files.os, "replace", lambda a, b: (done.append(f"to {Path(b).name}"), replace(a, b))[1])
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (done.append("fsync"), fsync(descriptor))[1])
    with written(tmp_path / "file") as partial:
        partial.touch()
    assert done == ["fsync", "to file", "fsync"]
    done.clear()
    with written_folder(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "one").touch()
    assert done == ["fsync", "fsync", "to folder", "fsync"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_words(error: Exception, tmp_path: Path):
    assert disk_is_full(error)
    words = r"no room on the disk for file: .* free, and it needs 3.0 KiB; .* Make room, then go on with resume=latest"
    with pytest.raises(UserError, match=words), no_room(tmp_path / "new" / "file", 3072):
        raise error
    with pytest.raises(ValueError, match="other"), no_room(tmp_path / "file", 1):
        raise ValueError("other")
