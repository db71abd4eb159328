"""The best evaluation of a run so far, whose checkpoint is kept beside the newest ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ngrpo_lora.errors import UserError
from ngrpo_lora.records.files import written

__all__ = ["Best"]


class Best:
    """The greatest value of a metric of evaluations, and when it was; of one with a minus sign in front, the lowest.

    metric: such as `eval/reward_mean`, or None: nothing is best.
    iteration, value: None before the first evaluation.
    """

    def __init__(self, metric: str | None):
        self.lower = (metric or "").startswith("-")
        self.metric = metric.removeprefix("-") if metric else None
        self.iteration: int | None = None
        self.value: float | None = None

    def note(self, iteration: int, metrics: Mapping[str, Any]) -> bool:
        """Take note of an evaluation; whether it is better than all before it. One without a value is not.

        Raises:
            UserError: evaluations have no such metric.
        """
        if self.metric is None:
            return False
        if self.metric not in metrics:
            known = ", ".join(key for key in metrics if key.startswith("eval/"))
            raise UserError(f"trainer.keep_best must be a metric of evaluations ({known}), got {self.metric!r}")
        value = metrics[self.metric]
        if value is None or value != value:
            return False
        better = self.value is None or (value < self.value if self.lower else value > self.value)
        if better:
            self.iteration, self.value = iteration, value
        return better

    def recall(self, rows: Iterable[Mapping[str, Any]], until: int) -> None:
        """Take note of the evaluations in lines of `metrics.jsonl` up to an iteration."""
        for row in rows:
            if self.metric in row and row["step"] <= until:
                self.note(row["step"], row)

    @property
    def kept(self) -> frozenset[int]:
        """The iterations whose checkpoints stay because of it."""
        return frozenset() if self.iteration is None else frozenset({self.iteration})

    def write(self, folder: Path) -> None:
        """Write `checkpoints/best.json`, which names the checkpoint, the metric and its value."""
        if self.iteration is not None:
            with written(folder / "checkpoints" / "best.json") as partial:
                found = {"iteration": self.iteration, "metric": self.metric, "value": self.value}
                partial.write_text(json.dumps(found) + "\n", encoding="utf-8")
