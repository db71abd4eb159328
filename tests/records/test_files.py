"""Files that are there whole or not at all, and files told apart by their contents."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngrpo_lora.records.files import digest, written, written_folder


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
