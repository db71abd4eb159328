"""The file of a part: which rows there are, and what has become of each; whole after every row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

from ngrpo_lora.adapters.header import code_version
from ngrpo_lora.bench.gpu.parts import Part
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.judging import write_json
from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import finite

__all__ = ["Result", "State", "opened_result", "read_result", "waiting", "write_result"]

State = Literal["waiting", "measured", "left out", "out of memory", "failed", "stopped"]
"""What has become of a row. A failure and a row that was stopped are tried again by the next call."""

FINAL: tuple[State, ...] = ("measured", "left out", "out of memory")

EMPTY: dict[str, Any] = {"label": "", "config": {}, "state": "waiting", "reason": None, "found": {}}
"""What every row has."""

Result = dict[str, Any]
"""A part's name, title and kind, the version and machine that its rows are of, and the rows with their
`label`, `config`, `state`, `reason` and, where measured, `found`."""


def opened_result(part: Part, path: Path, machine: str) -> Result:
    """The result of a part with the rows that are complete already; others wait to be measured.

    A row is complete where version, machine and configuration are those of now.

    Raises:
        ConfigError: the file is another one, or cannot be read.
    """
    head = {"part": part.name, "title": part.title, "kind": part.kind, "version": code_version(), "machine": machine}
    found = read_result(path) if path.exists() else {"rows": []}
    same = all(found.get(key) == value for key, value in head.items() if key != "title")
    complete = {row["label"]: row for row in found["rows"] if same and row["state"] in FINAL}
    rows = []
    for row in part.rows:
        config = finite(row.config.model_dump(mode="json"))
        kept = complete.get(row.label)
        fresh = {**EMPTY, "label": row.label, "config": config}
        rows.append(kept if kept and kept["config"] == config else fresh)
    return {**head, "rows": rows}


def read_result(path: Path) -> Result:
    """What is in the file of a part.

    Raises:
        ConfigError: it is another file, or cannot be read.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        whole = all({*EMPTY} <= {*row} and row["state"] in get_args(State) for row in result["rows"])
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise ConfigError(
            f"{str(path)!r} must be a file of `ngrpo bench report`, and is none; give another --output-dir"
        )
    return result


def write_result(path: Path, result: Result) -> None:
    """Write a part's file, whole or not at all."""
    with written(path) as partial:
        write_json(partial, result)


def waiting(result: Result) -> list[dict[str, Any]]:
    """The rows that are still to be measured, in their order."""
    return [row for row in result["rows"] if row["state"] == "waiting"]
