"""Held-out figures of a run as lines of text, and those of several runs as a Markdown table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngrpo_lora.records.metrics import has_same_prompts, measures, read_metrics, series

OTHER_PROMPTS = "other prompts"  # in place of a difference that would be of no meaning


def held_out(output_dir: Path) -> dict[str, tuple[float, float]]:
    """Held-out figures before and after training by name, those of each reward if there are several.

    The measures of the evaluation follow them. What is not in the first and the last evaluation is left out.
    """
    rows = read_metrics(output_dir / "metrics.jsonl")
    last = next((row for row in reversed(rows) if "eval/reward_mean" in row), rows[0])
    keys = {"reward": "eval/reward_mean", "strict accuracy": "eval/strict_accuracy"}
    labels = [key[len("eval/") : -len("_mean")] for key in rows[0] if re.fullmatch("eval/.+(?<!/reward)_mean", key)]
    if len(labels) > len(keys):
        keys |= {label: f"eval/{label}_mean" for label in labels}
    both = {name: key for name, key in keys.items() if key in rows[0] and key in last}
    values = {name: [value for _, value in series(rows, key)] for name, key in both.items()}
    return {name: (found[0], found[-1]) for name, found in values.items() if found} | measures(rows)


def figures(output_dir: Path) -> list[str]:
    """Text lines with the figures of `held_out`."""
    ends, alike = held_out(output_dir), has_same_prompts(output_dir)
    width = max([16, *map(len, ends)])
    return [
        f"held-out {name:<{width}} before {before:.3f}  after {after:.3f}  ({change(before, after, alike)})"
        for name, (before, after) in ends.items()
    ]


def change(before: float, after: float, alike: bool) -> str:
    """The difference of two figures in words, where both are of the same prompts and seeds."""
    return f"{after - before:+.3f}" if alike else OTHER_PROMPTS


def figures_table(output_dir: Path) -> str:
    """A Markdown table of the figures of `held_out`."""
    alike = has_same_prompts(output_dir)
    rows = [
        [name, f"{before:.3f}", f"{after:.3f}", change(before, after, alike)]
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
        ends, note = held_out(run), "" if has_same_prompts(run) else f" ({OTHER_PROMPTS})"
        for name, digits in (("reward", "{:.3f}"), ("strict accuracy", "{:.1%}")):
            cells.append(" → ".join(map(digits.format, ends[name])) + note if name in ends else "")
        table.append(cells)
    return markdown_table(["run", "iterations", "minutes", "reward", "strict accuracy"], table)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]], align: str = "---") -> str:
    """A Markdown table of cells, which are escaped already, below its head; `align` is the rule of every column."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, [align] * len(head), *rows))
