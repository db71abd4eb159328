"""The best evaluation of a run so far, whose checkpoint is kept beside the newest ones."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ngrpo_lora.config import TrainerConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.records.files import written

__all__ = ["Best", "ended_early"]


class Best:
    """The greatest value of a metric of evaluations, and when it was; of one with a minus sign in front, the lowest.

    metric: such as `eval/reward_mean`, or None: nothing is best.
    patience: how many evaluations in a row may fail to be better; None: any number.
    iteration, value: None before the first evaluation.
    waited: how many evaluations there were since.
    """

    def __init__(self, metric: str | None, patience: int | None = None):
        self.lower = (metric or "").startswith("-")
        self.metric = metric.removeprefix("-") if metric else None
        self.patience, self.waited = patience, 0
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
        value = math.nan if value is None else value
        better = value == value and (self.value is None or (value < self.value if self.lower else value > self.value))
        if better:
            self.iteration, self.value, self.waited = iteration, value, 0
        else:
            self.waited += 1
        return better

    def recall(self, rows: Iterable[Mapping[str, Any]], until: int) -> None:
        """Take note of the evaluations in lines of `metrics.jsonl` up to an iteration."""
        for row in rows:
            if self.metric in row and row["step"] <= until:
                self.note(row["step"], row)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether so many evaluations in a row were no better that the run should end."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def kept(self) -> frozenset[int]:
        """The iterations whose checkpoints stay because of it."""
        return frozenset() if self.iteration is None else frozenset({self.iteration})

    def __str__(self) -> str:
        found = "nowhere a number" if self.value is None else f"best ({self.value:.4g}) at iteration {self.iteration}"
        return f"{self.metric} was {found}, and no better in the last {self.waited} evaluations"

    def write(self, folder: Path) -> None:
        """Write `checkpoints/best.json`, which names the checkpoint, the metric and its value."""
        if self.iteration is not None:
            with written(folder / "checkpoints" / "best.json") as partial:
                found = {"iteration": self.iteration, "metric": self.metric, "value": self.value}
                partial.write_text(json.dumps(found) + "\n", encoding="utf-8")


def ended_early(config: TrainerConfig, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a run ended before its last iteration as `trainer.early_stopping_patience` wants; by its metrics."""
    best = Best(config.keep_best, config.early_stopping_patience)
    best.recall(rows, sys.maxsize)
    return best.is_out_of_patience
