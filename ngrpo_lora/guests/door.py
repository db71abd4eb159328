"""The way out of the process: a guest that takes it has failed, and the run goes on.

`os._exit` and `os.abort` end a program without a word, and with them what a run has not written yet. Called by a guest,
in its own thread or one that `in_thread` started, they raise SystemExit; a process that a guest forks may end so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["watched"]

_GUEST: ContextVar[bool] = ContextVar("guest", default=False)


@contextmanager
def watched() -> Iterator[None]:
    """Within the block, what would end the process at once raises SystemExit."""
    for name in ("_exit", "abort"):
        if not isinstance(way := getattr(os, name), _Way):
            setattr(os, name, _Way(name, way))
    token = _GUEST.set(True)
    try:
        yield
    finally:
        _GUEST.reset(token)


class _Way:
    """`os._exit` or `os.abort`: closed to guests of the process in which this was made, and open otherwise."""

    def __init__(self, name: str, open_way: Callable[..., object]):
        self.name, self.open_way, self.home = name, open_way, os.getpid()

    def __call__(self, *status: int) -> None:
        """End the process, or raise SystemExit with the status, or with the name of what has none."""
        if _GUEST.get() and os.getpid() == self.home:
            raise SystemExit(*(status or (self.name,)))
        self.open_way(*status)
