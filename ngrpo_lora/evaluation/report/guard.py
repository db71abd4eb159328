"""Warns on the screen while a run goes, as its report does on the page."""

from __future__ import annotations

import logging
from pathlib import Path

from ngrpo_lora.evaluation.report.health import FEWEST, findings, hacking
from ngrpo_lora.evaluation.report.record import Record
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.training.watcher import Start, Watcher
from ngrpo_lora.types import Metrics

log = logging.getLogger(__name__)


class Guard(Watcher):
    """Tells on the main process what a healthy run would not show, each kind of it once; the run goes on."""

    start: Start | None = None

    def before_start(self, start: Start) -> None:
        """Remember what the run has shown before it was resumed."""
        if start.is_main:
            self.start, self.folder = start, Path(start.config.output_dir)
            path = self.folder / "metrics.jsonl"
            self.rows = read_metrics(path) if path.is_file() else []
            self.told: set[str] = set()

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Judge the last iterations, and after an evaluation the rewards that are watched beside the trained ones."""
        if self.start is None:
            return
        config = self.start.config
        self.rows.append({"step": step} | metrics)
        found = [*findings(self.rows, config.rollout.group_size)] if len(self.rows) > FEWEST else []
        if "eval/reward_mean" in metrics:
            found += hacking(Record(self.folder, config, self.rows, is_running=True))
        for about, sentence in found:
            if about not in self.told:
                log.warning("iteration %d: %s", step, sentence)
                self.told.add(about)
