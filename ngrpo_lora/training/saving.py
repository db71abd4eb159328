"""Writes checkpoints beside the training: one at a time, in a thread, from a copy of the state."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Saver"]


class Saver:
    """Writes one checkpoint at a time in a thread of its own, and tells when one is on disk."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.under_way: tuple[int, Future[object]] | None = None
        self.written: list[int] = []

    def start(self, iteration: int, write: Callable[[], object]) -> None:
        """Begin to write the checkpoint of an iteration by `write()`, when the one before is on disk.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        self.under_way = iteration, self.thread.submit(write)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Raises:
            UserError: it could not be written.
        """
        if self.under_way is not None:
            (iteration, future), self.under_way = self.under_way, None
            future.result()
            self.written.append(iteration)

    def finished(self) -> list[int]:
        """The iterations whose checkpoints have come to disk since this was last asked for; waits for none.

        Raises:
            UserError: one could not be written.
        """
        if self.under_way is not None and self.under_way[1].done():
            self.wait()
        written, self.written = self.written, []
        return written
