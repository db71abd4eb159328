"""Files that are there whole or not at all, whatever ends the program, and files told apart by their contents."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ngrpo_lora.errors import UserError

__all__ = ["digest", "disk_is_full", "no_room", "written", "written_folder"]


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A place to write a file to, which takes the place of `path` when the block has ended well; makes its folder.

    A file that was there before stays as it is until then; what takes its place is on the disk, whatever happens to
    the machine.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def written_folder(path: Path) -> Iterator[Path]:
    """A place for a new folder, not made yet, which takes the place of `path` when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, former = (path.with_name(f".{path.name}.{what}") for what in ("partial", "former.partial"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        for entry in (*partial.rglob("*"), partial):
            flush(entry)
        if path.exists():
            os.replace(path, former)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        for left in (partial, former):
            shutil.rmtree(left, ignore_errors=True)


def flush(path: Path) -> None:
    """Make sure that a file's contents, or the names in a folder, are on the disk; where that can be asked for."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:  # of file systems that have no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def no_room(path: Path, needed: int) -> Iterator[None]:
    """Turn a disk without room for `needed` bytes below `path` into words, before the block or in it.

    Raises:
        UserError: there is less room, or the block has found that out.
    """
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    try:
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise UserError(
            f"no room on the disk for {path.name}: {str(folder)!r} has {in_words(free)} free, and it needs "
            f"{in_words(needed)}; what was there before is whole. Make room, then go on with resume=latest"
        ) from None


def disk_is_full(error: BaseException) -> bool:
    """Whether an error means that a disk, a quota or the allowed size of a file is used up."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors and torch have errors of their own for it, of which only the words tell.
    signs = ("No space left on device", "os error 28", "Disk quota", "File too large")
    return any(sign in str(error) for sign in signs)


def in_words(count: int) -> str:
    """Bytes with a unit, as in `3.2 GiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def digest(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
