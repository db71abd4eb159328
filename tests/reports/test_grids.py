"""Grids whose cells show their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pictures import COLORS, solid
from PIL import Image

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.records.metrics import PICTURES
from ngrpo_lora.records.pictures import collect, read_png_text
from ngrpo_lora.reports.grids import CAPTION_PX, CELL_PX, are_paired, save_grid, save_shown


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 6, 1), (6, 6, 1), (7, 6, 2), (8, 3, 3)])
def test_a_grid_has_columns_and_as_many_rows_as_it_takes(count: int, columns: int, rows: int, tmp_path: Path):
    save_grid(tmp_path / "grid.png", [solid(color) for color in COLORS[:count]], ["caption"] * count, columns)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (columns * CELL_PX, rows * (CELL_PX + CAPTION_PX))


def test_every_cell_shows_its_image_above_its_caption(tmp_path: Path):
    path = tmp_path / "deep" / "folder" / "grid.png"
    captions = ["a caption of some length that fills its two lines quite well"] * 7 + [""]
    save_grid(path, [solid(color) for color in COLORS], captions, columns=3)
    grid = np.asarray(Image.open(path))
    for index, color in enumerate(COLORS):
        x, y = index % 3 * CELL_PX, index // 3 * (CELL_PX + CAPTION_PX)
        assert tuple(grid[y + CELL_PX // 2, x + CELL_PX // 2]) == color
        has_text = (grid[y + CELL_PX : y + CELL_PX + CAPTION_PX, x : x + CELL_PX] < 128).any()
        assert has_text == bool(captions[index])
    assert (grid[-CAPTION_PX - CELL_PX :, 2 * CELL_PX :] == 255).all()  # the cell that is left over


def test_a_small_picture_is_enlarged_without_inventing_colours(tmp_path: Path):
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]] * 2, dtype=np.uint8))
    save_grid(tmp_path / "grid.png", [image], [""])
    colors = {color for _, color in Image.open(tmp_path / "grid.png").getcolors()}
    assert colors == {(255, 0, 0), (0, 0, 255), (255, 255, 255)}


@pytest.mark.parametrize(("width_px", "height_px"), [(40, 80), (80, 40), (640, 1280)])
def test_a_picture_keeps_its_proportions(width_px: int, height_px: int, tmp_path: Path):
    save_grid(tmp_path / "grid.png", [solid((200, 0, 0), width_px, height_px)], [""])
    red = np.argwhere((np.asarray(Image.open(tmp_path / "grid.png")) == (200, 0, 0)).all(2))
    height, width = red.max(0) - red.min(0) + 1
    assert width / height == width_px / height_px


def test_as_many_captions_as_images(tmp_path: Path):
    with pytest.raises(ValueError, match="zip"):
        save_grid(tmp_path / "grid.png", [solid(COLORS[0])] * 2, ["one"])


def test_shown_pictures_take_the_place_of_all_earlier_ones(tmp_path: Path):
    for count in (3, 2):
        save_shown(tmp_path / "last", [solid(color) for color in COLORS[:count]], ["a"] * 3, [7, 8, 9])
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["0.png", "1.png"]
    assert read_png_text(tmp_path / "last" / "1.png") == {"prompt": "a", "seed": "8"}
    save_shown(tmp_path / "last", [solid(COLORS[0])] * 2, ["a"] * 2, [7, 8], ["x+m", ""])
    found = [read_png_text(tmp_path / "last" / name) for name in ("0.png", "1.png")]
    assert found == [{"prompt": "a", "seed": "7", PICTURES: "x+m"}, {"prompt": "a", "seed": "8"}]


def test_pictures_are_paired_by_prompt_seed_and_source_where_both_say_it():
    text = {"prompt": "a", "seed": "7"}
    assert are_paired(text, text)
    assert are_paired(text, text | {PICTURES: "x"})
    assert are_paired(text | {PICTURES: "x"}, text | {PICTURES: "x"})
    for other in ({"seed": "8"}, {"prompt": "b"}, {PICTURES: "y"}):
        assert not are_paired(text | {PICTURES: "x"}, text | {PICTURES: "x"} | other)


def test_a_grid_is_no_picture_of_its_folder(tmp_path: Path):
    save_grid(tmp_path / "grid.png", [solid(COLORS[0])], ["a"])
    with pytest.raises(ConfigError, match=r"SOURCE must hold pictures .* has contact sheets only"):
        collect([tmp_path])
    save_shown(tmp_path / "last", [solid(COLORS[0])], ["a"], [7])
    (tmp_path / "last" / "0.png").rename(tmp_path / "a.png")
    assert [picture.path.name for picture in collect([tmp_path])] == ["a.png"]
    assert [picture.path.name for picture in collect([tmp_path / "grid.png"])] == ["grid.png"]  # asked for by name
