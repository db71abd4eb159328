"""Calls functions of the user's in threads, and shows in one line what they return or raise."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

__all__ = ["described", "in_thread", "shown"]


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Run `call` in a daemon thread without gradient; one that hangs does not keep the program alive."""
    future: Future[Any] = Future()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # a new thread begins with the first

    def run() -> None:
        try:
            with torch.cuda.device(gpu), torch.no_grad():
                future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    context = contextvars.copy_context()  # so that a guest's own threads are known as such
    threading.Thread(target=context.run, args=(run,), daemon=True).start()
    return future


def shown(value: object, length: int = 200) -> str:
    """At most `length` characters of what a function returned, on one line; of what cannot be shown, its type."""
    try:
        return " ".join(repr(value).split())[:length]
    except Exception:  # a number of more than 4300 digits, or a class of the user's whose text fails
        return f"a value of type {type(value).__name__} that cannot be shown"


def described(error: BaseException) -> str:
    """Type and text of an error on one line; of a call of `exit`, what it means."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a class of the user's whose text fails
        text = "its text cannot be shown"
    if isinstance(error, SystemExit):
        return f"SystemExit: it called exit({text}), and must return scores or raise an error instead"
    return f"{type(error).__name__}: {text}"
