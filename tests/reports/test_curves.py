"""Curves of a run: the summary page, several rewards, and the picture of its progress."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pictures import COLORS, solid
from PIL import Image

from ngrpo_lora.records.metrics import read_metrics, read_paired, save_scores
from ngrpo_lora.reports.curves import (
    Group,
    draw_curve,
    draw_measures,
    draw_progress,
    gain_correlations,
    gains,
    running_mean,
    write_comparison,
    write_summary,
)
from ngrpo_lora.reports.grids import save_grid, save_shown


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


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("watched", [(), ("a",), ("a", "b")])
def test_a_reward_without_a_score_of_held_out_pictures_has_no_part_in_the_summary(
    watched: tuple[str, ...], tmp_path: Path
):
    rows = [
        {"step": step, "rollout/vote_mean": 0.0, "eval/reward_mean": None, "eval/vote_mean": None} for step in (0, 7)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (0, 7):
        scores = {"vote": torch.full((3,), torch.nan)} | {label: torch.rand(3) for label in watched}
        save_scores(tmp_path / "evaluations" / f"{step:06d}.jsonl", ["p", "q", "r"], [5, 6, 7], scores)
        save_grid(tmp_path / "samples" / f"{step:06d}.png", [solid(COLORS[0])] * 6, ["caption"] * 6)
    assert [*gains(read_paired(tmp_path))] == gain_correlations(read_paired(tmp_path))[0] == [*watched]
    assert write_summary(tmp_path).is_file()


# Several rewards ----------------------------------------------------------------------------------------------------

FIRST = {"a": [1.0, 2.0, 3.0, 4.0], "b": [10.0, 20.0, 30.0, math.nan], "c": [5.0, 5.0, 5.0, 5.0]}

LAST = {"a": [2.0, 2.0, 4.0, math.nan], "b": [0.0, 20.0, 10.0, 10.0], "c": [5.0, 5.0, 5.0, 5.0]}


def save_evaluations(output_dir: Path) -> None:
    for step, columns in ((0, FIRST), (7, LAST)):
        scores = {label: torch.tensor(values) for label, values in columns.items()}
        save_scores(output_dir / "evaluations" / f"{step:06d}.jsonl", ["p", "q", "r", "s"], [5, 6, 7, 8], scores)


def test_a_gain_is_paired_and_in_the_bases_deviations(tmp_path: Path):
    save_evaluations(tmp_path)
    curves = gains(read_paired(tmp_path))
    assert curves["a"] == [(0, 0), (7, pytest.approx((1 + 0 + 1) / 3 / np.std(FIRST["a"])))]
    assert curves["b"] == [(0, 0), (7, pytest.approx((-10 + 0 - 20) / 3 / np.std([10, 20, 30])))]
    assert curves["c"] == [(0, 0), (7, 0)]


def test_gains_that_oppose_each_other_correlate_negatively(tmp_path: Path):
    save_evaluations(tmp_path)
    labels, values = gain_correlations(read_paired(tmp_path))
    assert labels == ["a", "b", "c"]
    assert values[0, 1] == pytest.approx(np.corrcoef([1, 0, 1], [-10, 0, -20])[0, 1])
    assert values[0, 1] < -0.8
    assert np.isnan(values[0, 2])  # what does not change has no correlation


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_gains_are_of_the_prompts_and_seeds_that_both_evaluations_have(tmp_path: Path):
    save_evaluations(tmp_path)
    seeds = [9, 7, 5, 6, 4]  # of which 5 and 7 are of the same prompts as in the first evaluation
    scores = {"a": torch.tensor([50.0, 5.0, 3.0, 70.0, 80.0]), "b": torch.tensor([0.0, 20.0, 20.0, 1.0, 2.0])}
    save_scores(tmp_path / "evaluations" / "000008.jsonl", ["p", "r", "p", "x", "s"], seeds, scores)
    curves = gains(read_paired(tmp_path))
    assert curves["a"][2:] == [(8, pytest.approx(2 / np.std(FIRST["a"])))]
    assert curves["b"][2:] == [(8, pytest.approx(0))]
    assert [step for step, _ in curves["c"]] == [0, 7]  # which is not watched any more
    labels, values = gain_correlations(read_paired(tmp_path))
    assert (labels, values.shape) == (["a", "b", "c"], (3, 3))
    save_scores(tmp_path / "evaluations" / "000009.jsonl", ["p", "q", "r", "s"], [1, 2, 3, 4], {"a": torch.ones(4)})
    evaluations = read_paired(tmp_path)
    assert gains(evaluations) == curves
    assert np.isnan(gain_correlations(evaluations)[1]).all()


def save_mixed(output_dir: Path) -> None:
    """A run whose evaluations after iteration 2 are of other prompts, and of others once more after iteration 4."""
    scores = {"a": torch.rand(3), "b": torch.rand(3)}
    rows = []
    for step, count in ((0, 2), (2, 2), (4, 3), (6, 3), (8, 1)):
        raw = {label: values[:count] for label, values in scores.items()}
        save_scores(output_dir / "evaluations" / f"{step:06d}.jsonl", ["p", "q", "r"][:count], [5, 6, 7][:count], raw)
        save_grid(output_dir / "samples" / f"{step:06d}.png", [solid(COLORS[0])] * count, ["caption"] * count)
        rows.append({"step": step, "rollout/a_mean": 0.1, "eval/reward_mean": step / 10, "eval/m": float(step)})
    (output_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_held_out_curve_does_not_join_other_prompts(tmp_path: Path):
    save_mixed(tmp_path)
    rows, axis = read_metrics(tmp_path / "metrics.jsonl"), Figure().subplots()
    draw_curve(axis, rows, tmp_path)
    assert {line.get_label(): line.get_xdata().tolist() for line in axis.lines} == {
        "held-out reward": [0, 2],
        "held-out reward, other prompts": [4, 6],
        "held-out reward, other prompts (2)": [8],
    }
    (measured,) = Figure().subplots(1, 1, squeeze=False)[0]
    draw_measures([measured], rows, ["m"], {0: 0, 2: 0, 4: 1, 6: 1, 8: 2})
    assert [line.get_xdata().tolist() for line in measured.lines] == [[0, 2], [4, 6], [8]]
    assert write_summary(tmp_path).is_file()


def test_runs_are_compared_by_curves_that_do_not_join_other_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_mixed(tmp_path)
    drawn: list[list[int]] = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axis, x, y, **style: drawn.append([*x]))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axis: None)
    write_comparison([tmp_path], tmp_path / "curves.png")
    assert drawn == [[0, 2], [4, 6], [8]]


def test_the_summary_of_several_rewards_has_a_line_for_each(tmp_path: Path):
    rows = [{"step": 0, "eval/reward_mean": 0.4}, {"step": 7, "rollout/a_mean": 0.1, "eval/reward_mean": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_grid(tmp_path / "samples" / "000000.png", [solid(COLORS[3])] * 6, ["caption"] * 6)
    with Image.open(write_summary(tmp_path)) as page:
        height = page.height
    save_evaluations(tmp_path)
    with Image.open(write_summary(tmp_path)) as page:
        assert page.height > height + 200
        pixels = np.asarray(page.convert("RGB")).astype(int)
    for color in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # matplotlib's first three
        assert (abs(pixels - np.array(color)) < 8).all(2).sum() > 100


def test_the_summary_has_a_curve_for_each_measure(tmp_path: Path):
    rows = [
        {"step": 7 * i, "eval/reward_mean": 0.4, "rollout/a_mean": 0.1, "eval/strict_accuracy": 0.5} for i in (0, 1)
    ]
    save_grid(tmp_path / "samples" / "000000.png", [solid(COLORS[3])] * 6, ["caption"] * 6)
    heights, purple = [], []
    for count in (0, 1, 4, 5):
        lines = [row | {f"eval/m{i}": row["step"] for i in range(count)} for row in rows]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        with Image.open(write_summary(tmp_path)) as page:
            heights.append(page.height)
            pixels = np.asarray(page.convert("RGB")).astype(int)
        purple.append((abs(pixels - np.array((148, 103, 189))) < 8).all(2).sum())  # tab:purple
    assert heights[0] + 150 < heights[1] == heights[2] < heights[3] - 150
    assert purple[0] == 0
    assert purple[1] > 100
    assert purple[2] == pytest.approx(4 * purple[1], rel=0.2)


# Progress -----------------------------------------------------------------------------------------------------------


def test_progress_shows_curve_pictures_and_the_group_best_first(tmp_path: Path):
    rows = [{"step": step, "rollout/reward_mean": step / 9, "eval/reward_mean": 0.5} for step in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    early = draw_progress(tmp_path)
    assert early.size == (640, 320)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert np.asarray(draw_progress(tmp_path)).tobytes() != np.asarray(early).tobytes()

    save_shown(tmp_path / "samples" / "first", [solid(color) for color in COLORS[:2]], ["a", "b"], [0, 1])
    save_shown(tmp_path / "samples" / "last", [solid(color) for color in COLORS[2:4]], ["a", "b"], [0, 1])
    page = np.asarray(draw_progress(tmp_path))
    assert [tuple(page[370, x]) for x in (40, 120, 360, 440)] == COLORS[:4]

    group = Group("a star", [solid(color, 64, 32) for color in COLORS[:4]], [0.1, 0.9, -1.0, 0.5])
    page = np.asarray(draw_progress(tmp_path, group))
    middle = len(page) - 40
    assert [tuple(page[middle, x]) for x in (80, 240, 400, 560)] == [COLORS[index] for index in (1, 3, 0, 2)]


@pytest.mark.parametrize("count", [2, 12, 24])
def test_progress_of_a_group_of_any_size_is_about_square(count: int, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    group = Group("a star " * 50, [solid(COLORS[0])] * count, [0.0] * count)
    page = draw_progress(tmp_path, group)
    assert page.width == 640
    assert 450 <= page.height <= 640
