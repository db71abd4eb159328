"""Writes the report of a run while it goes: a watcher, which the command hands to the trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ngrpo_lora.console import console
from ngrpo_lora.evaluation.report.page import FILE_NAME, write_report
from ngrpo_lora.evaluation.report.record import Record, save_group
from ngrpo_lora.reports.curves import Group
from ngrpo_lora.training.watcher import Start, Watcher
from ngrpo_lora.types import Metrics

log = logging.getLogger(__name__)


class Reporter(Watcher):
    """Writes `report.html` on the main process, after each evaluation and at the end; a failure is logged once."""

    start: Start | None = None
    group: tuple[int, Group] | None = None
    """The newest group that is not on disk, and the iteration that it is of, which may not be complete."""
    iteration = 0
    has_failed = False

    def before_start(self, start: Start) -> None:
        """Remember where the run writes to, on the process that does."""
        if start.is_main:
            self.start, self.iteration = start, start.iteration

    def after_rewards(self, prompt: str, images: Sequence[Image.Image], rewards: Sequence[float]) -> None:
        """Remember the newest group, which comes to disk with the next page."""
        self.group = self.iteration + 1, Group(prompt, images, rewards)

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Write the page after an evaluation."""
        self.iteration = step
        if "eval/reward_mean" in metrics:
            self.write(is_running=True)

    def close(self) -> None:
        """Say on the page that the run has stopped, or is finished."""
        self.write(is_running=False)

    def after_end(self, adapter: Path) -> None:
        """Write the page with the adapter, and say where it is."""
        self.write(is_running=False)
        if self.start is not None and not self.has_failed:
            console.print(f"report                    {Path(self.start.config.output_dir) / FILE_NAME}")

    def write(self, is_running: bool) -> None:
        """Write the group and the page; the run goes on whatever comes of it."""
        if self.start is None:
            return
        folder = Path(self.start.config.output_dir)
        try:
            if self.group is not None and self.group[0] <= self.iteration:
                iteration, group = self.group
                save_group(folder, iteration, group.prompt, group.images, group.rewards)
                self.group = None
            record = Record.read(folder, self.start.config, is_running)
            if record.rows:
                write_report([record], folder / FILE_NAME)
        except Exception as error:
            if not self.has_failed:
                log.warning(
                    "%s could not be written (%s: %s); the run goes on, and `ngrpo report %s` writes it anew",
                    *(folder / FILE_NAME, type(error).__name__, error, folder),
                )
            self.has_failed = True
