"""What a run is asked for from outside while it trains: to stop after this iteration, or to save and go on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from ngrpo_lora.console import console
from ngrpo_lora.ranks import launched

__all__ = ["MAX_HOURS", "Asked", "ending_in_order", "listening"]

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # not Windows
MAX_HOURS = "trainer.max_hours"
SAVING = getattr(signal, "SIGUSR1", None)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP within the block into SystemExit, so that what is left half made can be put away.

    They would end the process where it stands. Whoever handles them within the block (`listening`) has them first.
    """

    def end(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {one: signal.signal(one, end) for one in STOPPING if one != signal.SIGINT}  # Python's own raises
    try:
        yield
    finally:
        for one, handler in previous.items():
            if signal.getsignal(one) is end:
                signal.signal(one, handler)


class Asked:
    """Requests so far: `stop` names the reason to end after this iteration; `save` is whether to save and go on.

    Args:
        max_hours: a reason to stop by itself: hours since the process started; None: no limit.
    """

    def __init__(self, max_hours: float | None = None):
        self.reason: str | None = None
        self.save = False
        self.limit_s = None if max_hours is None else 3600 * max_hours
        self.longest_s = 0.0
        self.started = psutil.Process().create_time()
        self.lap = time.time()

    @property
    def stop(self) -> str | None:
        """Why to stop after this iteration: a signal's name or `trainer.max_hours`; None: no reason."""
        now = time.time()
        if self.reason is None and self.limit_s is not None and now - self.started + self.longest_s > self.limit_s:
            self.reason = MAX_HOURS
        return self.reason

    def next_lap(self) -> None:
        """Note that an iteration has ended, with what belongs to it: the longest is what the next one may take."""
        now = time.time()
        self.longest_s, self.lap = max(self.longest_s, now - self.lap), now

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since this was last called."""
        asked, self.save = self.save, False
        return asked


@contextmanager
def listening(tell: bool, max_hours: float | None = None) -> Iterator[Asked]:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request to stop after this iteration; a second stops at once.

    SIGUSR1, which schedulers send some time before the end, asks for a checkpoint.

    Args:
        tell: whether to say so.
    """
    asked = Asked(max_hours)

    def stop(signum: int, frame: Any) -> None:
        if asked.reason is not None:
            raise KeyboardInterrupt
        asked.reason = name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        if tell:
            console.print(f"{name}: stopping after this iteration; a second one stops at once")

    def save(signum: int, frame: Any) -> None:
        asked.save = True

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {one: signal.signal(one, stop) for one in STOPPING}
        if SAVING is not None:
            previous[SAVING] = signal.signal(SAVING, save)
    failed = True
    try:
        yield asked
        failed = False
    finally:
        for one, handler in previous.items():
            # A launcher ends all processes when the first one fails, also one that is about to say why it ends.
            is_ending = failed and one == signal.SIGTERM and launched()
            signal.signal(one, signal.SIG_IGN if is_ending else handler)
