"""Plots of a run: curves over iterations, gains of its rewards, and one page with the images before and after."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import held_out_series, measures, prompt_sets, read_metrics, read_paired, series
from ngrpo_lora.records.pictures import SHEET
from ngrpo_lora.reports.grids import LINE_PX, NUM_SHOWN

PER_LINE = 4  # measures side by side


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """Plot the held-out reward and strict accuracy of several runs over their iterations, one line a run."""
    metrics = [read_metrics(run / "metrics.jsonl") for run in runs]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    columns = (("eval/reward_mean", "held-out reward"), ("eval/strict_accuracy", "held-out strict accuracy"))
    for axis, (key, title) in zip(axes, columns, strict=True):
        for run, rows in zip(runs, metrics, strict=True):
            for name, points in held_out_series(rows, key, prompt_sets(run), run.name).items():
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xlabel="iteration", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as partial:
        figure.savefig(partial, dpi=110, format="png", metadata={SHEET: "curves"})
    plt.close(figure)
    return path


@dataclass(frozen=True)
class Group:
    """The candidates of one prompt, with their rewards."""

    prompt: str
    images: Sequence[Image.Image]
    rewards: Sequence[float]


def draw_progress(output_dir: Path, group: Group | None = None, width_px: int = 640) -> Image.Image:
    """Draw the progress of a run: its curve, held-out pictures of the base and of now, and a group, best first.

    It uses no state of pyplot, so that any thread may draw it, beside whatever else draws.
    """
    figure = Figure(figsize=(width_px / 100, width_px / 200), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw_curve(figure.subplots(), read_metrics(output_dir / "metrics.jsonl"), output_dir)
    canvas.draw()
    rows = [Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")]
    held_out = shown_pictures(output_dir)
    halves = [draw_strip(f"held-out, {title}", images, NUM_SHOWN, width_px // 2) for title, images in held_out.items()]
    if halves:
        rows.append(beside(halves, width_px))
    if group is not None:
        order = sorted(range(len(group.images)), key=lambda index: -group.rewards[index])
        title = f"{textwrap.shorten(group.prompt, 64)}: {group.rewards[order[0]]:.3g} to {group.rewards[order[-1]]:.3g}"
        columns = 4 if len(order) <= 4 else 6 if len(order) <= 12 else 8
        rows.append(draw_strip(title, [group.images[index] for index in order], columns, width_px))
    page = Image.new("RGB", (width_px, sum(row.height for row in rows)), "white")
    for index, row in enumerate(rows):
        page.paste(row, (0, sum(above.height for above in rows[:index])))
    return page


def beside(pictures: Sequence[Image.Image], width_px: int) -> Image.Image:
    """Pictures side by side in one row, `width_px` wide."""
    row = Image.new("RGB", (width_px, max(picture.height for picture in pictures)), "white")
    for index, picture in enumerate(pictures):
        row.paste(picture, (sum(left.width for left in pictures[:index]), 0))
    return row


def shown_pictures(output_dir: Path) -> dict[str, list[Image.Image]]:
    """Pictures of `save_shown` by title: `base`, and `now` for the latest evaluation after it; those that there are."""
    found = {}
    for part, title in (("first", "base"), ("last", "now")):
        paths = sorted((output_dir / "samples" / part).glob("*.png"), key=lambda path: int(path.stem))
        if paths:
            found[title] = [Image.open(path).convert("RGB") for path in paths]
    return found


def draw_strip(title: str, images: Sequence[Image.Image], columns: int, width_px: int) -> Image.Image:
    """Pictures of one size in rows of `columns`, below their title."""
    cell_px, gap_px = width_px // columns, 4
    scale = (cell_px - gap_px) / max(images[0].size)
    width, height = (round(side * scale) for side in images[0].size)
    rows = -(-len(images) // columns)
    strip = Image.new("RGB", (width_px, LINE_PX + rows * (height + gap_px)), "white")
    ImageDraw.Draw(strip).text((gap_px, 2), title, fill="black", font=ImageFont.load_default(11))
    for index, image in enumerate(images):
        place = (index % columns * cell_px + gap_px // 2, LINE_PX + index // columns * (height + gap_px))
        strip.paste(image.resize((width, height), Image.Resampling.BILINEAR), place)
    return strip


def running_mean(points: list[tuple[int, float]], width: int) -> list[tuple[float, float]]:
    """Moving average: the mean step and value of every `width` points that follow one another."""
    steps, values = (np.convolve(column, np.ones(width) / width, "valid") for column in zip(*points, strict=True))
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def judging(evaluations: dict[int, dict[str, np.ndarray]]) -> list[str]:
    """Labels of the rewards with a score in the first evaluation; of held-out pictures people are not asked for any."""
    return [label for label, scores in next(iter(evaluations.values())).items() if np.isfinite(scores).any()]


def gains(evaluations: dict[int, dict[str, np.ndarray]]) -> dict[str, list[tuple[int, float]]]:
    """Curves by reward: (iteration, mean gain over the first evaluation, in standard deviations of its scores).

    Only images that have a score both times count; an evaluation that has none of them has no point.

    Args:
        evaluations: scores of the same prompts and seeds, as of `read_paired`.
    """
    first = {label: next(iter(evaluations.values()))[label] for label in judging(evaluations)}
    deviation = {label: np.nanstd(scores) or 1.0 for label, scores in first.items()}
    curves: dict[str, list[tuple[int, float]]] = {label: [] for label in first}
    for step, scores in evaluations.items():
        for label in curves:
            gained = scores[label] - first[label]
            if np.isfinite(gained).any():
                curves[label].append((step, float(np.nanmean(gained) / deviation[label])))
    return curves


def gain_correlations(evaluations: dict[int, dict[str, np.ndarray]]) -> tuple[list[str], np.ndarray]:
    """Labels, and Pearson correlations (R, R) over images of what each reward gained from first to last evaluation.

    A value far below 0 means that where one reward gains, the other loses. All are NaN without an image in common.

    Args:
        evaluations: scores of the same prompts and seeds, as of `read_paired`.
    """
    first, *_, last = evaluations.values()
    labels = judging(evaluations)
    gained = np.ma.masked_invalid([last[label] - first[label] for label in labels])
    return labels, np.ma.corrcoef(gained).filled(np.nan)


def write_summary(output_dir: Path) -> Path:
    """Write `summary.png`: rewards over iterations, and the first and last sample grids.

    Between them stand each reward's gain, where there are several, and a small curve of every measure.
    """
    rows = read_metrics(output_dir / "metrics.jsonl")
    evaluations = read_paired(output_dir)
    several = len(evaluations) > 1 and len(judging(evaluations)) > 1
    grids = sorted((output_dir / "samples").glob("*.png"))
    measured = [*measures(rows)]
    lines = [measured[start : start + PER_LINE] for start in range(0, len(measured), PER_LINE)]
    heights = [1.1, *([0.9] if several else []), *[0.6] * len(lines), 1, 1]
    figure = plt.figure(figsize=(9.6, 3.1 * sum(heights) + 2.9), layout="constrained")
    parts = iter(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    draw_curve(next(parts).subplots(), rows, output_dir)
    if several:
        left, right = next(parts).subplots(1, 2, width_ratios=[1.5, 1])
        trained = {key.removeprefix("rollout/").removesuffix("_mean") for key in rows[-1] if key.startswith("rollout/")}
        draw_gains(left, gains(evaluations), trained)
        draw_correlations(right, *gain_correlations(evaluations))
    for names in lines:
        draw_measures(next(parts).subplots(1, PER_LINE, squeeze=False)[0], rows, names, prompt_sets(output_dir))
    for grid, title in zip((grids[0], grids[-1]), ("before", "after"), strict=True):
        axis = next(parts).subplots()
        axis.imshow(Image.open(grid))
        axis.set_title(f"{title} (iteration {int(grid.stem)})")
        axis.axis("off")
    path = output_dir / "summary.png"
    with written(path) as partial:
        figure.savefig(partial, dpi=110, format="png", metadata={SHEET: "curves"})
    plt.close(figure)
    return path


def draw_measures(
    axes: Sequence[Axes], rows: list[dict[str, Any]], names: Sequence[str], sets: Mapping[int, int]
) -> None:
    """Plot each measure of the evaluations over iterations, on an axis of its own; axes that are left stay empty.

    sets: the `prompt_sets` of the run; a curve ends where they change.
    """
    for axis in axes[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes, names, strict=False):
        for points in held_out_series(rows, f"eval/{name}", sets, name).values():
            axis.plot(*zip(*points, strict=True), marker="o", color="tab:purple")
        axis.set_title(f"held-out {name}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)


def draw_curve(axis: Axes, rows: list[dict[str, Any]], output_dir: Path) -> None:
    """Plot the training reward with its running mean, the held-out reward and strict accuracy.

    Evaluations of other prompts than the first one's have curves of their own.
    """
    training = series(rows, "rollout/reward_mean")
    width, sets = len(training) // 10, prompt_sets(output_dir)
    lines: list[tuple[Sequence[tuple[float, float]], str, dict[str, Any]]] = [
        (training, "training reward", {"color": "0.7", "linewidth": 1}),
        (running_mean(training, width) if width > 1 else [], f"training reward, mean of {width}", {"color": "0.3"}),
    ]
    for key, name, style in (
        ("eval/reward_mean", "held-out reward", {"color": "tab:blue", "marker": "o"}),
        ("eval/strict_accuracy", "held-out strict accuracy", {"color": "tab:green", "marker": "s"}),
    ):
        for label, points in held_out_series(rows, key, sets, name).items():
            lines.append((points, label, style | {"linestyle": "-" if label == name else "--"}))
    for points, label, style in lines:
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)
    axis.set(xlabel="iteration", title=output_dir.name)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()


def draw_gains(axis: Axes, curves: dict[str, list[tuple[int, float]]], trained: set[str]) -> None:
    """Plot the gain of each reward as a line, dashed for rewards that are only watched."""
    for label, points in curves.items():
        kind = "trained on" if label in trained else "watched"
        axis.plot(
            *zip(*points, strict=True), marker="o", ls="-" if label in trained else "--", label=f"{label}, {kind}"
        )
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.set(xlabel="iteration", title="held-out gain, in standard deviations of the base's scores")
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def draw_correlations(axis: Axes, labels: list[str], values: np.ndarray) -> None:
    """Draw a correlation matrix, blue where rewards rise together and red where one pays for the other."""
    axis.imshow(values, cmap="RdBu", vmin=-1, vmax=1)
    for row, column in np.ndindex(values.shape):
        shade = "white" if abs(values[row, column]) > 0.6 else "black"
        text = f"{values[row, column]:.2f}" if np.isfinite(values[row, column]) else "–"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=shade)
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_title("correlation of the gains, image by image", fontsize=10)
