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

PICTURES = "edited_pictures"  # column of an evaluation: a digest of the source that was edited, and of its mask

Drawn = tuple[str, int, str]  # prompt, seed, and the digest of the pictures that were edited, empty where none were


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


def save_scores(
    path: Path, prompts: Sequence[str], seeds: Sequence[int], scores: dict[str, Tensor], pictures: Sequence[str] = ()
) -> None:
    """Write every score of an evaluation, one line an image, so that runs can be compared image by image.

    Args:
        pictures: `Prompt.pictures` of each prompt; what is empty is not written.
    """
    columns = {label: raw.tolist() for label, raw in scores.items()}
    with written(path) as partial, partial.open("w") as file:
        for row, (prompt, seed, edited) in enumerate(zip(prompts, seeds, pictures or [""] * len(prompts), strict=True)):
            drawn = {"prompt": prompt, "seed": seed} | ({PICTURES: edited} if edited else {})
            file.write(to_line(drawn | {k: values[row] for k, values in columns.items()}))


def labels_of(row: Mapping[str, Any]) -> list[str]:
    """The rewards of a line of an evaluation; the other columns say what was drawn."""
    return [label for label in row if label not in ("prompt", "seed", PICTURES)]


def read_evaluations(output_dir: Path) -> dict[int, dict[Drawn, dict[str, Any]]]:
    """The lines of all evaluations of a run, by iteration and by what was drawn.

    Lines of earlier versions tell edits by prompt and seed alone: they count as being of the pictures of the first
    evaluation that says them.
    """
    paths = sorted((output_dir / "evaluations").glob("*.jsonl"))
    evaluations = {int(path.stem): read_metrics(path) for path in paths}
    known: dict[tuple[str, int], str] = {}
    for row in (row for rows in evaluations.values() for row in rows if PICTURES in row):
        known.setdefault((row["prompt"], row["seed"]), row[PICTURES])

    def drawn(row: dict[str, Any]) -> Drawn:
        pair = row["prompt"], row["seed"]
        return *pair, row.get(PICTURES, known.get(pair, ""))

    return {step: {drawn(row): row for row in rows} for step, rows in evaluations.items()}


def read_scores(output_dir: Path) -> dict[int, dict[str, np.ndarray]]:
    """Scores of all evaluations of a run: by iteration and label, (N,) with NaN where a reward failed."""
    evaluations = {}
    for path in sorted((output_dir / "evaluations").glob("*.jsonl")):
        rows = read_metrics(path)
        evaluations[int(path.stem)] = {
            label: np.array([row[label] for row in rows], dtype=float) for label in labels_of(rows[0])
        }
    return evaluations


def read_paired(output_dir: Path) -> dict[int, dict[str, np.ndarray]]:
    """Scores of all evaluations of a run, in the rows (N,) and labels of the first one.

    They are NaN where a reward failed, and where an evaluation has no such prompt, seed and picture to edit, or no such
    reward.
    """
    evaluations = read_evaluations(output_dir)
    first = next(iter(evaluations.values()), {})
    labels = labels_of(next(iter(first.values()), {}))
    return {
        step: {label: np.array([found.get(key, {}).get(label) for key in first], dtype=float) for label in labels}
        for step, found in evaluations.items()
    }


def prompt_sets(output_dir: Path) -> dict[int, int]:
    """Which evaluations drew the same prompts and seeds: the number of their set by iteration, 0 for the first one's.

    A run that was resumed by an earlier version, or whose prompt file or pictures have changed, may have several.
    """
    numbers: dict[frozenset[Drawn], int] = {}
    evaluations = read_evaluations(output_dir)
    return {step: numbers.setdefault(frozenset(found), len(numbers)) for step, found in evaluations.items()}


def has_same_prompts(output_dir: Path) -> bool:
    """Whether a run's first and last evaluation drew the same prompts and seeds, as far as the run has kept them.

    Edits of other pictures are other prompts.
    """
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
