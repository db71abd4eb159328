"""Pictures of a run: captioned grids, and one page with the reward curve and the images before and after."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw, ImageFont

from ngrpo_lora.tracking import read_metrics, series

CELL_PX, CAPTION_PX = 160, 34


def save_grid(path: Path, images: Sequence[Image.Image], captions: Sequence[str], columns: int = 6) -> None:
    """Images with their captions below, `columns` a row; small ones are enlarged without smoothing."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * CELL_PX, rows * (CELL_PX + CAPTION_PX)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = index % columns * CELL_PX, index // columns * (CELL_PX + CAPTION_PX)
        resample = Image.Resampling.NEAREST if max(image.size) < CELL_PX else Image.Resampling.LANCZOS
        scale = (CELL_PX - 6) / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        sheet.paste(image.resize(size, resample), (x + (CELL_PX - size[0]) // 2, y + 3))
        lines = textwrap.wrap(caption, 28)[:2]
        canvas.multiline_text((x + 4, y + CELL_PX), "\n".join(lines), fill="black", font=font, spacing=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """The held-out reward and strict accuracy of several runs over their iterations, one line a run."""
    metrics = [read_metrics(run / "metrics.jsonl") for run in runs]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    columns = (("eval/reward_mean", "held-out reward"), ("eval/strict_accuracy", "held-out strict accuracy"))
    for axis, (key, title) in zip(axes, columns, strict=True):
        for run, rows in zip(runs, metrics, strict=True):
            points = series(rows, key)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=run.name)
        axis.set(xlabel="iteration", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def running_mean(points: list[tuple[int, float]], width: int) -> list[tuple[float, float]]:
    """The mean step and value of every `width` points that follow each other."""
    steps, values = (np.convolve(column, np.ones(width) / width, "valid") for column in zip(*points, strict=True))
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def write_summary(output_dir: Path) -> Path:
    """`summary.png`: rewards over iterations, and the first and last sample grids."""
    rows = read_metrics(output_dir / "metrics.jsonl")
    grids = sorted((output_dir / "samples").glob("*.png"))
    figure, axes = plt.subplots(3, 1, figsize=(9.6, 12.5), height_ratios=[1.1, 1, 1], layout="constrained")
    curve = axes[0]
    for key, label, style in (
        ("rollout/reward_mean", "training reward", {"color": "0.7", "linewidth": 1}),
        ("eval/reward_mean", "held-out reward", {"color": "tab:blue", "marker": "o"}),
        ("eval/strict_accuracy", "held-out strict accuracy", {"color": "tab:green", "marker": "s"}),
    ):
        points = series(rows, key)
        if points:
            curve.plot(*zip(*points, strict=True), label=label, **style)
    training = series(rows, "rollout/reward_mean")
    width = len(training) // 10
    if width > 1:
        label = f"training reward, mean of {width}"
        curve.plot(*zip(*running_mean(training, width), strict=True), label=label, color="0.3", zorder=1.5)
    curve.set(xlabel="iteration", title=output_dir.name)
    curve.grid(alpha=0.3)
    curve.legend()
    for axis, grid, title in zip(axes[1:], (grids[0], grids[-1]), ("before", "after"), strict=True):
        axis.imshow(Image.open(grid))
        axis.set_title(f"{title} (iteration {int(grid.stem)})")
        axis.axis("off")
    path = output_dir / "summary.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
