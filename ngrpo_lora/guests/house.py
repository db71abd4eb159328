"""Keeps what a guest changes of the whole process from the run and from other guests.

A guest is a reward or measure of the user's. It runs in this process, where the default dtype, the working folder or
`os.environ` are everybody's. So a guest is alone in the house until one call has shown that it leaves all as it was;
from then on it comes together with others, while pictures are drawn. What it changed is put back when it leaves, and
of what it may need (OWN) put on again when it returns, alone.

The random states of Python, NumPy and PyTorch are not looked at: a run draws from generators of its own.
"""

from __future__ import annotations

import builtins
import gc
import json
import locale
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch

from ngrpo_lora.guests.door import watched

__all__ = ["Changes", "Guest", "kept", "thread_kept"]

log = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long a guest waits at the door; one inside that hangs must not keep all others out for ever."""

Changes = dict[str, Any]
"""What a guest left changed: its values by the setting's name."""


class Setting(NamedTuple):
    """Something that belongs to the whole process, or to the thread, and that a guest can change."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_determinism(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _set_anomaly(value: tuple[bool, bool]) -> None:
    torch.autograd.set_detect_anomaly(*value)


def _cudnn() -> tuple[bool, bool, bool]:
    flags = torch.backends.cudnn
    return flags.enabled, flags.benchmark, flags.deterministic


def _set_cudnn(value: tuple[bool, bool, bool]) -> None:
    flags = torch.backends.cudnn
    flags.enabled, flags.benchmark, flags.deterministic = value


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # somebody has deleted it
        return None


def _set_folder(value: str | None) -> None:
    with suppress(OSError):
        os.chdir(value or "/")


def _set_environment(value: Mapping[str, str]) -> None:
    for name in os.environ.keys() - value.keys():
        del os.environ[name]
    os.environ.update({name: text for name, text in value.items() if os.environ.get(name) != text})


def _set_path(value: list[str]) -> None:
    sys.path[:] = value


def _set_arguments(value: list[str]) -> None:
    sys.argv = value


def _set_streams(value: tuple[Any, Any, Any]) -> None:
    sys.stdin, sys.stdout, sys.stderr = value


def _set_filters(value: list[Any]) -> None:
    warnings.resetwarnings()  # also has what was decided by other filters forgotten
    warnings.filters[:] = value  # pyright: ignore


PLAIN = (logging.NOTSET, False, True)


def _our_loggers() -> dict[str, logging.Logger]:
    known = {**logging.root.manager.loggerDict}
    return {n: one for n, one in known.items() if n.split(".")[0] == "ngrpo_lora" and isinstance(one, logging.Logger)}


def _logging() -> tuple[Any, ...]:
    ours = {name: (one.level, one.disabled, one.propagate) for name, one in _our_loggers().items()}
    root = logging.root
    return root.level, [*root.handlers], root.manager.disable, {n: found for n, found in ours.items() if found != PLAIN}


def _set_logging(value: tuple[Any, ...]) -> None:
    level, handlers, disabled, ours = value
    logging.root.setLevel(level)
    logging.root.handlers[:] = handlers
    logging.disable(disabled)
    for name, one in _our_loggers().items():
        level, one.disabled, one.propagate = ours.get(name, PLAIN)
        one.setLevel(level)


def _signals() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _set_signals(value: Mapping[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # no other thread can have changed them
        for number, handler in value.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


def _set_locale(value: str) -> None:
    locale.setlocale(locale.LC_ALL, value)


def _set_gradient(value: bool) -> None:
    torch.set_grad_enabled(value)


def _set_device(value: torch.device) -> None:
    torch.set_default_device(None if value.type == "cpu" else value)


PYTHONS = [
    (module, name)
    for module in (builtins, json, os)
    for name, one in vars(module).items()
    if callable(one) and name not in ("_exit", "abort")  # which the door changes
]


def _functions() -> list[Any]:
    return [getattr(module, name, None) for module, name in PYTHONS]


def _set_functions(value: list[Any]) -> None:
    for (module, name), one in zip(PYTHONS, value, strict=True):
        setattr(module, name, one)


def _hooks() -> tuple[Any, ...]:
    return sys.excepthook, threading.excepthook, warnings.showwarning


def _set_hooks(value: tuple[Any, ...]) -> None:
    sys.excepthook, threading.excepthook, warnings.showwarning = value


def _mask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _set_mask(value: int) -> None:
    os.umask(value)


def _set_collection(value: bool) -> None:
    (gc.enable if value else gc.disable)()


def _set_rounding(value: Any) -> None:
    np.seterr(**value)


# What pictures depend on; the run itself leaves it alone, so that it can also be put back beside the run.
SHARED = {
    "torch's default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "torch's number of threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic algorithms": Setting(_determinism, _set_determinism),
    "torch's matmul precision": Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's anomaly detection": Setting(_anomaly, _set_anomaly),
    "torch.backends.cudnn": Setting(_cudnn, _set_cudnn),
    "the working folder": Setting(_folder, _set_folder),
}
# What a guest may need again at its next call.
OWN = SHARED | {
    "os.environ": Setting(lambda: dict(os.environ), _set_environment),
    "sys.path": Setting(lambda: [*sys.path], _set_path),
    "Python's recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
    "the timeout of sockets": Setting(socket.getdefaulttimeout, socket.setdefaulttimeout),
}
# What belongs to a thread; threads that are a guest's alone end with it.
THREAD = {
    "torch's gradient mode": Setting(torch.is_grad_enabled, _set_gradient),
    "torch's default device": Setting(torch.get_default_device, _set_device),
    "NumPy's error handling": Setting(np.geterr, _set_rounding),
}
ALL = (
    OWN
    | THREAD
    | {
        "sys.argv": Setting(lambda: [*sys.argv], _set_arguments),
        "sys.stdin, stdout or stderr": Setting(lambda: (sys.stdin, sys.stdout, sys.stderr), _set_streams),
        "the filters of warnings": Setting(lambda: [*warnings.filters], _set_filters),
        "logging": Setting(_logging, _set_logging),
        "signal handlers": Setting(_signals, _set_signals),
        "functions of builtins, json or os": Setting(_functions, _set_functions),
        "the hooks of errors and warnings": Setting(_hooks, _set_hooks),
        "the permissions of new files": Setting(_mask, _set_mask),
        "the collection of garbage": Setting(gc.isenabled, _set_collection),
        "the locale": Setting(lambda: locale.setlocale(locale.LC_ALL), _set_locale),
    }
)


def snapshot(settings: Mapping[str, Setting]) -> Changes:
    """The value of each setting now."""
    return {name: setting.read() for name, setting in settings.items()}


def put_back(before: Changes) -> Changes:
    """Give settings their former values, and return the values of those that had others."""
    changed = {name: now for name, value in before.items() if (now := ALL[name].read()) != value}
    for name in changed:
        ALL[name].write(before[name])
    return changed


@contextmanager
def kept(own: Changes) -> Iterator[Changes]:
    """Put on what a guest has of its own, and put all back at the end; it fills the dictionary that it gives.

    In that are, at the end, all settings that the block left with other values than they had before.
    """
    before, changes = snapshot(ALL), Changes()
    try:
        for name, value in own.items():
            OWN[name].write(value)
        yield changes
    finally:
        changes |= put_back(before)


@contextmanager
def thread_kept() -> Iterator[None]:
    """Put back, at the end, what belongs to this thread, which several guests share."""
    before = snapshot(THREAD)
    try:
        yield
    finally:
        put_back(before)


class Guest:
    """A reward or measure, and how it behaves.

    own: what it has changed and may need again: values by the setting's name.
    known: whether its last call alone left all as it was.
    """

    def __init__(self, label: str, own: Changes | None = None, trusted: bool = False):
        """`trusted` is code of this package, which changes nothing; `own` what a guest changed at its import."""
        self.label, self.known, self.trusted = label, trusted, trusted
        self.own = {} if own is None else {name: value for name, value in own.items() if name in OWN}
        self.has_changed = self.told = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A call of this guest: alone, or together with others that leave all as it was."""
        if _INSIDE.get():  # called by another guest
            yield
            return
        token = _INSIDE.set(True)
        try:
            with watched(), HOUSE.together(self) if self.known else HOUSE.alone(self):
                yield
        finally:
            _INSIDE.reset(token)

    def judge(self, changes: Changes) -> None:
        """Draw conclusions from what a call alone has changed, and warn once."""
        self.known, self.own = not changes, {name: value for name, value in changes.items() if name in OWN}
        # Where a first call loads a library, that may set filters and loggers, once.
        if changes and (self.own or self.has_changed) and not self.told:
            self.told = True
            log.warning(
                "%s changes %s for the whole process; this is put back after each call, and while it is called "
                "nothing else goes on, which takes longer: leave it as it is, or undo it before the function returns",
                self.label,
                ", ".join(changes),
            )
        self.has_changed = bool(changes)


_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)


class House:
    """Lets guests in: those that leave all as it was together, any other alone."""

    def __init__(self) -> None:
        self.door = threading.Condition()
        self.inside: list[Guest] = []
        self.visitors: list[Guest] = []  # all that have been in since it was empty
        self.is_taken = False
        self.before: Changes = {}

    @contextmanager
    def alone(self, guest: Guest) -> Iterator[None]:
        """A visit of one that may change anything."""
        with self.door:
            self.door.wait_for(lambda: not self.is_taken and not self.inside, PATIENCE_S)
            self.is_taken = True
        changes = Changes()
        try:
            with kept(guest.own) as changes:
                yield
        finally:
            guest.judge(changes)
            with self.door:
                self.is_taken = False
                self.door.notify_all()

    @contextmanager
    def together(self, guest: Guest) -> Iterator[None]:
        """A visit of one that is known to leave all as it was. The last to leave sees to it that this is so."""
        with self.door:
            self.door.wait_for(lambda: not self.is_taken, PATIENCE_S)
            if not self.inside:
                self.before, self.visitors = snapshot(SHARED), []
            self.inside.append(guest)
            self.visitors.append(guest)
        try:
            yield
        finally:
            with self.door:
                self.inside.remove(guest)
                if not self.inside and not all(one.trusted for one in self.visitors) and put_back(self.before):
                    for one in self.visitors:  # the next call of each, alone, shows whose it was
                        one.known = one.trusted
                self.door.notify_all()


HOUSE = House()
