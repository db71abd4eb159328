"""What a run says while it runs: `metrics.jsonl`, one line a step, and a progress bar."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ngrpo_lora.types import Metrics


class MetricsFile:
    """`metrics.jsonl`. Opened for a resumed run, it drops the lines after the checkpoint."""

    def __init__(self, path: Path, resume_after: int | None):
        kept = []
        if resume_after is not None and path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= resume_after]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(to_line(row) for row in kept))
        partial.replace(path)
        self.file = path.open("a")

    def write(self, step: int, metrics: Metrics) -> None:
        """Append one step; a value that is not finite is written as null."""
        self.file.write(to_line({"step": step} | metrics))
        self.file.flush()


def to_line(row: dict[str, Any]) -> str:
    """Strict JSON: NaN and infinity are null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of `metrics.jsonl`; a line torn by a crash is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def progress_bar() -> Progress:
    """Iterations, time left, reward and evaluations."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
