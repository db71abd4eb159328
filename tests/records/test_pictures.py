"""Where pictures come from: files, grids and their prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pictures import paint
from PIL import Image

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.records.pictures import collect


def test_a_prompt_comes_from_the_text_beside_the_table_or_the_picture_itself(tmp_path: Path):
    for name in "abcde":
        paint(tmp_path / f"{name}.png", 0, 0, 0, prompt="its own, ünïcödé", seed="3")
    paint(tmp_path / "f.png", 0, 0, 0, prompt="a graph")  # ComfyUI's: no seed beside it
    (tmp_path / "a.txt").write_text("beside\n")
    rows = [{"file_name": "b.png", "prompt": "in the table", "count": 2}, {"file_name": "c.png", "count": 3}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = {picture.path.stem: picture for picture in collect([tmp_path])}
    assert [found[name].prompt for name in "abcf"] == ["beside", "in the table", "its own, ünïcödé", None]
    assert [found[name].metadata for name in "abc"] == [{}, {"count": 2}, {"count": 3}]
    assert {picture.prompt for picture in collect([tmp_path], "for all")} == {"for all"}


def test_a_grid_is_read_row_by_row(tmp_path: Path):
    sheet = Image.new("RGB", (30, 20))
    for cell in range(6):
        sheet.paste((cell, 0, 0), (cell % 3 * 10, cell // 3 * 10, cell % 3 * 10 + 10, cell // 3 * 10 + 10))
    sheet.save(tmp_path / "grid.png")
    cells = collect([tmp_path / "grid.png"], "p", (2, 3))
    assert [cell.load().getcolors() for cell in cells] == [[(100, (cell, 0, 0))] for cell in range(6)]
    assert cells[4].name.endswith("grid.png#10,10")
    with pytest.raises(ConfigError, match=r"--grid 3x3 .*'.*grid.png' is 30 x 20 px"):
        collect([tmp_path / "grid.png"], "p", (3, 3))


def test_pictures_of_any_mode_are_read_upright(tmp_path: Path):
    turned = Image.new("RGB", (4, 2), (200, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        Image.new(mode, (4, 2)).save(tmp_path / f"{mode[0]}{len(mode)}.tif")
    loaded = {picture.path.name: picture.load() for picture in collect([tmp_path])}
    assert loaded.pop("turned.jpg").size == (2, 4)
    assert {(image.mode, image.size) for image in loaded.values()} == {("RGB", (4, 2))}
    assert len(loaded) == 7


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", "ein Käse".encode("latin-1"), "byte 5 of 'a.txt' is not UTF-8"),
        ("metadata.jsonl", "ein Käse".encode("latin-1"), "byte 5 of 'metadata.jsonl' is not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.png", "prompt": "\\ud800"}', "must hold lines like .*, but line 1 is"),
        ("metadata.jsonl", b"[" * 100_000, "must hold lines like .*, but line 1 is"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused(name: str, content: bytes, problem: str, tmp_path: Path):
    paint(tmp_path / "a.png", 0, 0, 0)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=problem):
        collect([tmp_path])
