"""Held-out figures of a run as lines of text, and those of several runs as a Markdown table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngrpo_lora.records.metrics import measures, read_metrics, series


def held_out(output_dir: Path) -> dict[str, tuple[float, float]]:
    """Held-out figures before and after training by name, those of each reward if there are several.

    The measures of the evaluation follow them.
    """
    rows = read_metrics(output_dir / "metrics.jsonl")
    keys = {"reward": "eval/reward_mean", "strict accuracy": "eval/strict_accuracy"}
    labels = [key[len("eval/") : -len("_mean")] for key in rows[0] if re.fullmatch("eval/.+(?<!/reward)_mean", key)]
    if len(labels) > len(keys):
        keys |= {label: f"eval/{label}_mean" for label in labels}
    values = {name: [value for _, value in series(rows, key)] for name, key in keys.items()}
    return {name: (found[0], found[-1]) for name, found in values.items() if found} | measures(rows)


def figures(output_dir: Path) -> list[str]:
    """Text lines with the figures of `held_out`."""
    ends = held_out(output_dir)
    width = max([16, *map(len, ends)])
    return [
        f"held-out {name:<{width}} before {before:.3f}  after {after:.3f}  ({after - before:+.3f})"
        for name, (before, after) in ends.items()
    ]


def figures_table(output_dir: Path) -> str:
    """A Markdown table of the figures of `held_out`."""
    rows = [
        [name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
        for name, (before, after) in held_out(output_dir).items()
    ]
    return markdown_table(["held-out", "before", "after", "change"], rows)


def comparison_table(runs: Sequence[Path]) -> str:
    """A Markdown table of runs: iterations, minutes of training, and held-out figures before and after."""
    table = []
    for run in runs:
        rows = read_metrics(run / "metrics.jsonl")
        seconds = sum(value or 0.0 for row in rows for key, value in row.items() if key.startswith("time/"))
        cells = [run.name, str(rows[-1]["step"]), f"{seconds / 60:.1f}"]
        for key, digits in (("eval/reward_mean", "{:.3f}"), ("eval/strict_accuracy", "{:.1%}")):
            values = [value for _, value in series(rows, key)]
            cells.append(" → ".join(digits.format(value) for value in (values[0], values[-1])) if values else "")
        table.append(cells)
    return markdown_table(["run", "iterations", "minutes", "reward", "strict accuracy"], table)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]], align: str = "---") -> str:
    """A Markdown table of cells, which are escaped already, below its head; `align` is the rule of every column."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, [align] * len(head), *rows))
