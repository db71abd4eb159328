"""Held-out figures of a run as lines of text, and those of several runs as a Markdown table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngrpo_lora.records.metrics import read_metrics, series


def figures(output_dir: Path) -> list[str]:
    """Text lines with held-out figures before and after training, those of each reward if there are several."""
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
