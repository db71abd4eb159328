"""A run's numbers on disk: `metrics.jsonl`, one line a step, and each evaluation's scores, one line an image."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ngrpo_lora.records.files import written
from ngrpo_lora.types import Metrics


class MetricsFile:
    """Writer of `metrics.jsonl`; opened for a resumed run, it drops the lines after the checkpoint."""

    def __init__(self, path: Path, resume_after: int | None):
        rows = []
        if resume_after is not None and path.exists():
            rows = [row for row in read_metrics(path) if row["step"] <= resume_after]
        *complete, self.last = rows or [{}]
        with written(path) as partial:
            partial.write_text("".join(map(to_line, complete)))
        self.file = path.open("a")
        self.start = self.file.tell()  # of the last line
        if self.last:
            self.rewrite()

    def write(self, step: int, metrics: Metrics) -> None:
        """Append a line of metrics, or add to the last one where that is of this step; NaN and infinity become null."""
        if self.last.get("step") != step:
            self.last, self.start = {"step": step}, self.file.tell()
        self.last |= metrics
        self.rewrite()

    def rewrite(self) -> None:
        """Write the last line of the file anew in its place."""
        self.file.truncate(self.start)
        self.file.write(to_line(self.last))
        self.file.flush()

    def has(self, key: str) -> bool:
        """Whether the last line has the metric `key`."""
        return key in self.last


def to_line(row: dict[str, Any]) -> str:
    """A row as a line of strict JSON, in which NaN and infinity become null."""
    return json.dumps(finite(row)) + "\n"


def finite(value: Any) -> Any:
    """A copy of nested lists and dictionaries with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of `metrics.jsonl`; a line torn by a crash is dropped."""
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # no JSON, or no text at all
            rows.append(json.loads(line))
    return rows


def save_scores(path: Path, prompts: Sequence[str], seeds: Sequence[int], scores: dict[str, Tensor]) -> None:
    """Write every score of an evaluation, one line an image, so that runs can be compared image by image."""
    columns = {label: raw.tolist() for label, raw in scores.items()}
    with written(path) as partial, partial.open("w") as file:
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            file.write(to_line({"prompt": prompt, "seed": seed} | {k: values[row] for k, values in columns.items()}))


def read_scores(output_dir: Path) -> dict[int, dict[str, np.ndarray]]:
    """Scores of all evaluations of a run: by iteration and label, (N,) with NaN where a reward failed."""
    evaluations = {}
    for path in sorted((output_dir / "evaluations").glob("*.jsonl")):
        rows = read_metrics(path)
        labels = [label for label in rows[0] if label not in ("prompt", "seed")]
        evaluations[int(path.stem)] = {label: np.array([row[label] for row in rows], dtype=float) for label in labels}
    return evaluations


def read_paired(output_dir: Path) -> dict[int, dict[str, np.ndarray]]:
    """Scores of all evaluations of a run, in the rows (N,) and labels of the first one.

    They are NaN where a reward failed, and where an evaluation has no such prompt and seed or no such reward.
    """
    evaluations: dict[int, dict[str, np.ndarray]] = {}
    keys: list[tuple[str, int]] = []
    labels: list[str] = []
    for path in sorted((output_dir / "evaluations").glob("*.jsonl")):
        found = {(row["prompt"], row["seed"]): row for row in read_metrics(path)}
        keys = keys or [*found]
        labels = labels or [label for label in found[keys[0]] if label not in ("prompt", "seed")]
        evaluations[int(path.stem)] = {
            label: np.array([found.get(key, {}).get(label) for key in keys], dtype=float) for label in labels
        }
    return evaluations


def prompt_sets(output_dir: Path) -> dict[int, int]:
    """Which evaluations drew the same prompts and seeds: the number of their set by iteration, 0 for the first one's.

    A run that was resumed by an earlier version, or whose prompt file has changed, may have several.
    """
    numbers: dict[frozenset[tuple[str, int]], int] = {}
    found = {}
    for path in sorted((output_dir / "evaluations").glob("*.jsonl")):
        drawn = frozenset((row["prompt"], row["seed"]) for row in read_metrics(path))
        found[int(path.stem)] = numbers.setdefault(drawn, len(numbers))
    return found


def has_same_prompts(output_dir: Path) -> bool:
    """Whether a run's first and last evaluation drew the same prompts and seeds, as far as the run has kept them."""
    return [0, *prompt_sets(output_dir).values()][-1] == 0


def held_out_series(
    rows: Sequence[Mapping[str, Any]], key: str, sets: Mapping[int, int], name: str
) -> dict[str, list[tuple[int, float]]]:
    """`series` of a metric of evaluations by a name for each curve: those of other prompts make curves of their own.

    sets: the `prompt_sets` of the run.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, value in series(rows, key):
        number = sets.get(step, 0)
        title = f"{name}, other prompts" if number else name
        curves.setdefault(f"{title} ({number})" if number > 1 else title, []).append((step, value))
    return curves


def measures(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Values of `evaluation.measures` in the first and in the last evaluation, by name; of those that are in both."""
    evaluated = [row for row in rows if "eval/reward_mean" in row]
    if not evaluated:
        return {}
    first, last = measured(evaluated[0]), measured(evaluated[-1])
    return {name: (value, last[name]) for name, value in first.items() if name in last}


def measured(row: dict[str, Any]) -> dict[str, float]:
    """Values of `evaluation.measures` in one line of metrics, by name; those of rewards end in `_mean`."""
    own = re.compile(r"eval/(?!strict_accuracy$)(.+)(?<!_mean)")
    found = {match[1]: value for key, value in row.items() if (match := own.fullmatch(key))}
    return {name: value for name, value in found.items() if value is not None}


def series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of every line that has the metric `key`."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]
