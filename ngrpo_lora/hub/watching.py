"""Pushes a run while it trains and when it is complete: a watcher, which the command hands to the trainer."""

from __future__ import annotations

from pathlib import Path

from ngrpo_lora.console import console
from ngrpo_lora.hub.pushing import Pusher
from ngrpo_lora.training.watcher import Start, Watcher


class HubWatcher(Watcher):
    """Pushes a run as its `hub` section says: after checkpoints beside the training, and at the end; else does nothing.

    Raises:
        UserError: the last push failed, at the end; the message says how to try again.
    """

    pusher: Pusher | None = None

    def before_start(self, start: Start) -> None:
        """Start the thread that pushes, on the main process."""
        hub = start.config.hub
        if hub.repo is not None and start.is_main:
            self.pusher = Pusher(Path(start.config.output_dir), hub)

    def after_save(self, step: int, last: bool) -> None:
        """Start to push a checkpoint, but not the last one, which is pushed with the adapter."""
        if self.pusher is not None and self.pusher.hub.push == "checkpoints" and not last:
            self.pusher.start()

    def after_end(self, adapter: Path) -> None:
        """Push the adapter of a finished run, and wait for it."""
        if self.pusher is not None:
            console.print(f"pushed to                 {self.pusher.finish()}")
