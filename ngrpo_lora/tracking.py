"""What a run says: `metrics.jsonl`, one line a step; on screen what will be done, a progress bar, what came of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from ngrpo_lora.config import RunConfig
from ngrpo_lora.types import Metrics

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class MetricsFile:
    """`metrics.jsonl`. Opened for a resumed run, it drops the lines after the checkpoint."""

    def __init__(self, path: Path, resume_after: int | None):
        rows = []
        if resume_after is not None and path.exists():
            rows = [row for row in read_metrics(path) if row["step"] <= resume_after]
        *complete, self.last = rows or [{}]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(map(to_line, complete)))
        partial.replace(path)
        self.file = path.open("a")
        self.start = self.file.tell()  # of the last line
        if self.last:
            self.rewrite()

    def write(self, step: int, metrics: Metrics) -> None:
        """Append a line, or add to the last one where that is of this step; NaN and infinity are null."""
        if self.last.get("step") != step:
            self.last, self.start = {"step": step}, self.file.tell()
        self.last |= metrics
        self.rewrite()

    def rewrite(self) -> None:
        """Put the last line in its place."""
        self.file.truncate(self.start)
        self.file.write(to_line(self.last))
        self.file.flush()

    def has(self, key: str) -> bool:
        """Whether the last line has this metric."""
        return key in self.last


def to_line(row: dict[str, Any]) -> str:
    """Strict JSON: NaN and infinity are null."""
    return json.dumps(finite(row)) + "\n"


def finite(value: Any) -> Any:
    """The same lists and dictionaries with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of `metrics.jsonl`; a line torn by a crash is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def save_scores(path: Path, prompts: Sequence[str], seeds: Sequence[int], scores: dict[str, Tensor]) -> None:
    """Every score of an evaluation, one line an image, so that runs can be compared image by image."""
    columns = {label: raw.tolist() for label, raw in scores.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            file.write(to_line({"prompt": prompt, "seed": seed} | {k: values[row] for k, values in columns.items()}))


def read_scores(output_dir: Path) -> dict[int, dict[str, np.ndarray]]:
    """Every evaluation of a run: scores (N,) by label, NaN where one failed, by iteration."""
    evaluations = {}
    for path in sorted((output_dir / "evaluations").glob("*.jsonl")):
        rows = read_metrics(path)
        labels = [label for label in rows[0] if label not in ("prompt", "seed")]
        evaluations[int(path.stem)] = {label: np.array([row[label] for row in rows], dtype=float) for label in labels}
    return evaluations


def series(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of every line that has this metric."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def opening(config: RunConfig, trained: int, total: int, processes: int = 1) -> str:
    """What the run will do, with the derived batch numbers."""
    rollout, length = config.rollout, config.trainer.num_iterations
    samples = rollout.prompts_per_iteration * rollout.group_size
    names = " + ".join(f"{r.weight:g} x {r.key}" if r.weight != 1 else r.key for r in config.rewards.train)
    lines = [
        f"{config.algorithm.name} on {config.model.path}: {length} iterations into {config.output_dir}",
        f"  an iteration: {rollout.prompts_per_iteration} prompts x {rollout.group_size} candidates = {samples} images",
        f"  an image: {rollout.num_steps} {rollout.solver} steps, scored by {names}",
        f"  trained: {trained / 1e6:.2f} M LoRA parameters of rank {config.lora.rank} on a frozen {total / 1e6:.1f} M",
        f"  evaluated on {config.evaluation.num_prompts} held-out prompts every {config.evaluation.every} iterations",
    ]
    if processes > 1:
        lines.insert(1, f"  {processes} processes, each with whole groups; the base is {config.trainer.strategy}")
    return "\n".join(lines)


def estimate(iteration_s: float, iterations: int, evaluation_s: float, evaluations: int) -> str:
    """How long the rest takes, by what the first iteration and the first evaluation took."""
    minutes = (iteration_s * iterations + evaluation_s * evaluations) / 60
    return f"  about {max(1, round(minutes))} min: {iteration_s:.1f} s an iteration, {evaluation_s:.1f} s an evaluation"


def figures(output_dir: Path) -> list[str]:
    """Held-out figures before and after, of several rewards each, one a line."""
    rows = read_metrics(output_dir / "metrics.jsonl")
    keys = {"reward": "eval/reward_mean", "strict accuracy": "eval/strict_accuracy"}
    labels = [key[len("eval/") : -len("_mean")] for key in rows[0] if re.fullmatch("eval/.+(?<!/reward)_mean", key)]
    if len(labels) > len(keys):
        keys |= {label: f"eval/{label}_mean" for label in labels}
    lines = []
    for name, key in keys.items():
        values = [value for _, value in series(rows, key)]
        if values:
            lines.append(
                f"held-out {name:<16} before {values[0]:.3f}  after {values[-1]:.3f}  ({values[-1] - values[0]:+.3f})"
            )
    return lines


def closing(output_dir: Path, adapter: Path) -> str:
    """The figures of a run, and where everything is."""
    lines = [
        *figures(output_dir),
        f"pictures and curve        {output_dir / 'summary.png'}",
        f"adapter                   {adapter}",
        f"draw with it              ngrpo sample --adapter {adapter} --prompt '...' --seed 0",
        f"how sure it is            ngrpo score {output_dir}",
    ]
    return "\n".join(lines)


def comparison_table(runs: Sequence[Path]) -> str:
    """Markdown: for every run its iterations, minutes of training, and held-out figures before and after."""
    lines = ["| run | iterations | minutes | reward | strict accuracy |", "|---|---|---|---|---|"]
    for run in runs:
        rows = read_metrics(run / "metrics.jsonl")
        seconds = sum(value or 0.0 for row in rows for key, value in row.items() if key.startswith("time/"))
        cells = [run.name, str(rows[-1]["step"]), f"{seconds / 60:.1f}"]
        for key, digits in (("eval/reward_mean", "{:.3f}"), ("eval/strict_accuracy", "{:.1%}")):
            values = [value for _, value in series(rows, key)]
            cells.append(" → ".join(digits.format(value) for value in (values[0], values[-1])) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class RunProgress(Progress):
    """The bar and its times, and below it what the last iteration came to."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """One line of columns, one of status for each task."""
        yield self.make_tasks_table(self.tasks)
        yield from (Text(f"  {task.fields['status']}", no_wrap=True) for task in self.tasks)


def progress_bar() -> RunProgress:
    """Iterations, times, and a status of any length."""
    return RunProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
    )
