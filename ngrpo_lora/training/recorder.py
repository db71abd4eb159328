"""What a run leaves in its folder on the way: its configuration, `metrics.jsonl`, and the summary of both."""

from __future__ import annotations

from pathlib import Path

from ngrpo_lora.config import dump_config
from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import MetricsFile
from ngrpo_lora.reports.curves import write_summary
from ngrpo_lora.training.inputs import warn_of_changes
from ngrpo_lora.training.watcher import Start, Watcher
from ngrpo_lora.types import Metrics


class Recorder(Watcher):
    """Writes for all processes, so only the main one has it. It comes first: the others find everything on disk."""

    def before_start(self, start: Start) -> None:
        """The configuration, and the metrics file, without what came after a checkpoint that the run goes on from."""
        self.output_dir = Path(start.config.output_dir)
        config = start.config.model_copy(update={"resume": None})  # which is how it was started, not what it is
        with written(self.output_dir / "config.yaml") as partial:
            partial.write_text(dump_config(config), encoding="utf-8")
        warn_of_changes(start.config, self.output_dir, start.config.resume is not None)
        resumed = start.iteration if start.config.resume else None
        self.metrics = MetricsFile(self.output_dir / "metrics.jsonl", resumed)

    def after_update(self, step: int, metrics: Metrics) -> None:
        """The line of an iteration, before its evaluation, which may fail."""
        self.metrics.write(step, metrics)

    def after_step(self, step: int, metrics: Metrics) -> None:
        """The same line with its evaluation."""
        self.metrics.write(step, metrics)

    def after_end(self, adapter: Path) -> None:
        """Curve and pictures, before and after, on one sheet."""
        write_summary(self.output_dir)
