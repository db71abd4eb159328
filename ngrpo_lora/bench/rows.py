"""A bench that takes long, row by row: its file, which a second call goes on with, and the time that is left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ngrpo_lora.adapters.header import code_version
from ngrpo_lora.bench.varying import Setting
from ngrpo_lora.config import changed_keys, parse_config
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.judging import write_json
from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import finite

__all__ = ["Countdown", "Rows", "machine"]

Row = dict[str, Any]


class Rows:
    """What a bench has measured, by the setting's label: in a JSON file that is whole after every row, or nowhere.

    A row of the file counts as measured where its configuration is the setting's. Rows of other values of the varied
    keys stay in the file.
    """

    def __init__(self, path: Path | None, bench: str, asked: dict[str, Any], settings: Sequence[Setting]):
        """Read the rows that are there, and write the file, so that what cannot be written is known at once.

        Args:
            asked: what else makes rows comparable, such as counts and `machine()`, as JSON.
        Raises:
            ConfigError: the file is another one, or of another version or configuration, or cannot be written.
        """
        self.path = path
        self.head = {"bench": bench, "version": code_version(), **asked}
        self.rows: dict[str, Row] = {}
        if path is None:
            return
        if path.exists():
            self.rows = self._read(path, settings)
        try:
            self._write()
        except OSError as error:
            raise ConfigError(f"--output must be a writable file, got {str(path)!r}: {error.strerror}") from None

    def _read(self, path: Path, settings: Sequence[Setting]) -> dict[str, Row]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            head = {key: found[key] for key in self.head}
            rows = {row["label"]: row for row in found["rows"]}
            others = [change for row in rows.values() for change in _changes(row, settings)]
        except (OSError, ValueError, TypeError, KeyError):  # a configuration of another version is a ValueError too
            raise ConfigError(
                f"--output must be a new file or one of `ngrpo bench {self.head['bench']}`, but {str(path)!r} is "
                "neither; give another name"
            ) from None
        changes = [f"{key}: {head[key]} -> {value}" for key, value in self.head.items() if head[key] != value]
        if changes := changes or others:
            raise ConfigError(
                f"--output {str(path)!r} has rows that were measured otherwise ({', '.join(dict.fromkeys(changes))}); "
                "give another file, or delete it"
            )
        return rows

    def add(self, setting: Setting, row: Row) -> None:
        """Keep a row with its setting and configuration, and write the file anew."""
        own = {"label": setting.label, "setting": setting.values, "config": setting.config.model_dump(mode="json")}
        self.rows[setting.label] = finite({**own, **row})
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            with written(self.path) as partial:
                write_json(partial, {**self.head, "rows": [*self.rows.values()]})


def _changes(row: Row, settings: Sequence[Setting]) -> list[str]:
    """What the configuration of a row has otherwise than the settings; the varied keys of a row not asked for may."""
    same = next((setting for setting in settings if setting.label == row["label"]), None)
    varied = [] if same else [*row["setting"], *settings[0].values]
    free = ("output_dir", *("algorithm." if key in ("algorithm", "algorithm.name") else key for key in varied))
    changes = changed_keys(parse_config(row["config"]), (same or settings[0]).config)
    return [change for change in changes if not change.startswith(free)]


def machine() -> str:
    """What times are of: PyTorch's version, and the GPU or the CPU's threads."""
    gpu = torch.cuda.is_available()
    return f"PyTorch {torch.__version__}, " + (
        torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    )


class Countdown:
    """Tells now and then how far a long measurement is, and about how long the rest takes."""

    def __init__(self, total: float, tell: Callable[[str], None], every_s: float = 10.0):
        """Start the clock from which the time left is estimated.

        Args:
            total: all the work, in any unit that is about proportional to time.
        """
        self.total, self.tell, self.every_s = total, tell, every_s
        self.finished = 0.0
        self.start = self.told = time.monotonic()

    def done(self, work: float, what: str) -> None:
        """Count some work as done; told at most every `every_s` seconds, and at the end."""
        self.finished += work
        now = time.monotonic()
        if now - self.told >= self.every_s or self.finished >= self.total:
            left_s = (now - self.start) * (self.total - self.finished) / self.finished
            left = f"{left_s / 60:.0f} min" if left_s >= 90 else f"{left_s:.0f} s"
            self.tell(f"{what}: {self.finished / self.total:.0%} of all, about {left} left")
            self.told = now
