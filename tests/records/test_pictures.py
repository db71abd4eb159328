"""Where pictures come from: files, grids and their prompts."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import paint
from PIL import Image

from ngrpo_lora.errors import ConfigError, UserError
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


def test_pictures_are_scored_as_people_see_them(tmp_path: Path):
    """Pillow's own `convert` cuts 16 bits off at 255, and shows what is behind transparent parts."""
    Image.fromarray(np.full((4, 4), 20_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    clear, deep = (picture.load().getcolors() for picture in collect([tmp_path]))
    assert (clear, deep) == ([(16, (255,) * 3)], [(16, (78,) * 3)])


def test_pixels_without_a_known_white_are_refused(tmp_path: Path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif' must have pixels with a known white, but it has 32-bit pixels"):
        collect([tmp_path])


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_the_frames_of_a_video_are_as_people_see_them(form: str, tmp_path: Path):
    """Transparent parts are on white; into WebP videos Pillow writes none."""
    ground = (255,) * 4 if form == "WEBP" else (0,) * 4
    frames = [Image.new("RGBA", (16, 16), ground) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((200, 0, 0, 255), (4 * number, 0, 4 * number + 4, 16))
    options = {"disposal": 2} if form == "GIF" else {"lossless": True} if form == "WEBP" else {}
    path = tmp_path / f"a.{form.lower()}"
    frames[0].save(path, form, save_all=True, append_images=frames[1:], **options)
    (picture,) = collect([tmp_path])
    for number, seen in enumerate(picture.frames()):
        expected = Image.new("RGB", (16, 16), "white")
        expected.paste((200, 0, 0), (4 * number, 0, 4 * number + 4, 16))
        np.testing.assert_allclose(np.asarray(seen, int), np.asarray(expected, int), atol=2)
    assert len(picture.frames()) == 3
    assert picture.load().tobytes() == picture.frames()[1].tobytes()


def sized(path: Path, side: int) -> Path:
    """A PNG file whose header says that it has so many pixels a side."""
    Image.new("1", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.mark.filterwarnings("error")
def test_a_picture_with_too_many_pixels_is_refused_with_the_most(tmp_path: Path):
    with pytest.raises(UserError, match="must have at most 178,956,970 pixels, but it has more; make it smaller"):
        collect([sized(tmp_path / "a.png", 13_378)])
    with pytest.raises(UserError, match="must be a readable image"):  # its pixels are missing
        collect([sized(tmp_path / "a.png", 13_377)])


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
