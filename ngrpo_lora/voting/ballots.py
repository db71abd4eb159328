"""Votes: what a person said of a group of pictures, and the file that keeps every word of it.

`votes.jsonl` is only ever appended to, so whatever ends the program, all earlier lines stay what they are. A line is a
vote, or takes one back (`{"undone": "GROUP"}`); of one group the last one counts. The pictures are beside it, in a
folder of the file's name.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.records.files import written
from ngrpo_lora.voting.preferences import choices_of

__all__ = ["Ballot", "Group", "VotesFile"]


@dataclass(frozen=True)
class Group:
    """The pictures of one prompt, among which a person chooses."""

    prompt: str
    images: Sequence[Image.Image]

    @cached_property
    def pictures(self) -> tuple[str, ...]:
        """A name of each picture that is its contents'."""
        return tuple(_digest(f"{image.size}".encode() + image.convert("RGB").tobytes()) for image in self.images)

    @cached_property
    def name(self) -> str:
        """A name of the group that is its prompt's and its pictures': the same group drawn again has it again."""
        return _digest("\n".join([self.prompt, *self.pictures]).encode())

    @cached_property
    def files(self) -> tuple[bytes, ...]:
        """The pictures as PNG."""
        return tuple(_png(image) for image in self.images)


class _Line(BaseModel, frozen=True):
    model_config = ConfigDict(extra="forbid", strict=True)


class Ballot(_Line, frozen=True):
    """What a person said of a group."""

    group: str = Field(description="Name of the group.")
    prompt: str = Field(description="What all pictures should show.")
    pictures: tuple[str, ...] = Field(min_length=2, description="Names of the pictures, in the order of their numbers.")
    said: Literal["order", "none", "skip"] = Field(
        description="order: some pictures are better than others; none: no picture is any good; skip: nothing."
    )
    orders: tuple[tuple[tuple[int, ...], ...], ...] = Field(
        default=(), description="Orders of pictures by number: tiers, best first (`preferences.py`); pairs have two."
    )
    predicted: float | None = Field(
        default=None, ge=0, le=1, description="Share of the pairs said that the head had right before it knew of them."
    )
    time: str = Field(default="", description="When it was said, in UTC.")

    @model_validator(mode="after")
    def _says_something(self) -> Ballot:
        count = len(self.pictures)
        for order in self.orders:
            numbers = [number for tier in order for number in tier]
            if any(not 0 <= number < count for number in numbers):
                raise ValueError(f"orders must name pictures from 0 to {count - 1}, got {numbers}")
            if len(set(numbers)) < len(numbers):
                raise ValueError(f"an order must name a picture once, got {numbers}")
        if self.said == "order" and not choices_of(self.orders):
            raise ValueError("an order must say that one picture is better than another, got none that does")
        if self.said != "order" and self.orders:
            raise ValueError(f"orders must be empty where {self.said} is said, got {len(self.orders)}")
        return self


class _Undone(_Line, frozen=True):
    undone: str


class VotesFile:
    """All votes of a file, which grows by each new one.

    ballots: what counts, by the group's name, in the order in which it was said.
    damaged: numbers of lines that cannot be read; they stay in the file.
    """

    def __init__(self, path: Path):
        """Read the votes so far; a file that is not there has none.

        Raises:
            ConfigError: it cannot be read, or no line of it is a vote.
        """
        self.path, self.ballots = path, dict[str, Ballot]()
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise ConfigError(f"votes must be a file, but {str(path)!r} is not: {error.strerror}") from None
        *whole, torn = data.split(b"\n")
        filled = {number: line for number, line in enumerate([*whole, torn], 1) if line.strip()}
        self.damaged = [number for number, line in filled.items() if not self._read(line)]
        if any(number <= len(whole) for number in filled) and len(self.damaged) == len(filled):
            raise ConfigError(
                f"votes must be a file that votes were kept in, but no line of {str(path)!r} is one; give another path"
            )
        self.size, self.is_torn = len(data), bool(torn)

    def _read(self, line: bytes) -> bool:
        """Take note of a line; whether it is one of ours."""
        try:
            ballot = Ballot.model_validate_json(line)
        except ValidationError:
            try:
                self.ballots.pop(_Undone.model_validate_json(line).undone, None)
            except ValidationError:
                return False
            return True
        self.ballots.pop(ballot.group, None)  # so that it stands where it was last said
        self.ballots[ballot.group] = ballot
        return True

    @property
    def pictures(self) -> Path:
        """The folder of the pictures, each NAME.png."""
        return self.path.with_suffix("")

    def check_writable(self) -> None:
        """Make its folder, and check that it can be written, before anybody is asked.

        Raises:
            ConfigError: it cannot.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.path.open("ab").close()
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise ConfigError(
                f"votes must be a file that can be written, but {str(self.path)!r} is not: {error.strerror}; choose "
                "another"
            ) from None

    def add(self, ballot: Ballot, group: Group) -> None:
        """Keep a vote and the pictures that it is about, on the disk before this returns.

        Raises:
            UserError: it cannot be written; the vote does not count then.
        """
        try:
            for name, data in zip(group.pictures, group.files, strict=True):
                if not (path := self.picture(name)).exists():
                    with written(path) as partial:
                        partial.write_bytes(data)
        except OSError as error:
            raise self._unwritten(error) from error
        self._append(ballot.model_dump_json())
        self.ballots.pop(ballot.group, None)
        self.ballots[ballot.group] = ballot

    def undo(self, group: str) -> None:
        """Take back what was said of a group; UserError where that cannot be written."""
        self._append(_Undone(undone=group).model_dump_json())
        self.ballots.pop(group, None)

    def picture(self, name: str) -> Path:
        """The file of a picture."""
        return self.pictures / f"{name}.png"

    def _append(self, line: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.size and not self.path.exists():  # somebody has moved it away
                lines, self.size, self.is_torn = [*map(_line, self.ballots.values())], 0, False
            else:
                lines = [b"\n"] if self.is_torn else []  # the end of a line that a crash cut off stays alone
            with self.path.open("ab") as file:
                file.write(b"".join([*lines, line.encode() + b"\n"]))
                file.flush()
                os.fsync(file.fileno())
                self.size, self.is_torn = file.tell(), False
        except OSError as error:
            self.is_torn = True  # perhaps
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(
            f"the vote cannot be kept in {str(self.path)!r}: {error.strerror}; it does not count: make room there, "
            "then vote again"
        )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _line(ballot: Ballot) -> bytes:
    return ballot.model_dump_json().encode() + b"\n"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
