"""One process at a time owns an output folder: a lock, which the system releases however the process ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ngrpo_lora.errors import UserError

__all__ = ["making", "owned", "owner"]

log = logging.getLogger(__name__)

LOCK_FILE, OWNER_FILE = ".lock", ".owner.json"


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder for the block, with those above it; of what was made, what is empty at its end goes again."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # something is in it, or it is gone
            for one in made:
                one.rmdir()


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a run's folder within the block; makes the folder, which goes again where nothing came into it.

    Raises:
        UserError: another process has it; says which.
    """
    with making(folder), _locked(folder):
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock within the block; its file goes again where the block has left nothing beside it."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(taken(folder)) from None
    except (OSError, NotImplementedError) as error:  # a file system without locks
        log.warning("%s cannot be locked (%s): start no second run in it", folder, error)
        yield
        return
    mine = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        with contextlib.suppress(OSError):  # a full disk; the lock is what counts
            (folder / OWNER_FILE).write_text(json.dumps(mine), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / OWNER_FILE).unlink(missing_ok=True)
            if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
        lock.release()


def owner(folder: Path) -> str | None:
    """Say in words that another process owns a run's folder; None where none does. Nothing is made or kept."""
    if not (folder / LOCK_FILE).is_file():
        return None
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return taken(folder)
    except (OSError, NotImplementedError):
        return None
    lock.release()
    return None


def taken(folder: Path) -> str:
    """The message that a folder belongs to another process."""
    who = "another process"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
        who = f"process {known['process']} on {known['machine']}, since {known['since']}"
    return (
        f"output_dir must belong to one run at a time, but {str(folder)!r} is in use ({who}); wait for it or end it, "
        "or give another output_dir"
    )
