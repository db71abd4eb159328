"""Pictures of a run: grids whose cells show their images, and the summary page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ngrpo_lora.report import CAPTION_PX, CELL_PX, running_mean, save_grid, write_summary

COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200), (90, 90, 90), (0, 0, 0)]


def solid(color: tuple[int, int, int], width_px: int = 64, height_px: int = 64) -> Image.Image:
    return Image.new("RGB", (width_px, height_px), color)


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


def test_a_running_mean_on_numbers():
    points = [(1, 1.0), (2, 3.0), (4, 8.0), (5, 4.0)]
    assert running_mean(points, 2) == [(1.5, 2.0), (3.0, 5.5), (4.5, 6.0)]
    assert running_mean(points, 4) == [(3.0, 4.0)]


def test_the_summary_shows_curves_and_the_pictures_before_and_after(tmp_path: Path):
    rows = [{"step": 0, "eval/reward_mean": 0.4, "eval/strict_accuracy": 0.2}]
    rows += [{"step": step, "rollout/reward_mean": 0.1 * step, "eval/reward_mean": None} for step in range(1, 6)]
    rows += [{"step": 6, "rollout/reward_mean": None, "eval/reward_mean": 0.8}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, color in ((0, COLORS[0]), (3, COLORS[2]), (6, COLORS[1])):
        save_grid(tmp_path / "samples" / f"{step:06d}.png", [solid(color)] * 6, ["caption"] * 6)
    path = write_summary(tmp_path)
    assert path == tmp_path / "summary.png"
    with Image.open(path) as page:
        assert min(page.size) > 800
        pixels = np.asarray(page.convert("RGB")).astype(int)
    rows = [(pixels == color).all(2).nonzero()[0] for color in COLORS[:3]]
    before, after, neither = rows
    assert len(before) > 10_000
    assert len(after) > 10_000
    assert before.max() < after.min()
    assert len(neither) == 0
    curve = (abs(pixels - np.array([31, 119, 180])) < 8).all(2).nonzero()[0]
    assert len(curve) > 100
    assert curve.max() < before.min()
