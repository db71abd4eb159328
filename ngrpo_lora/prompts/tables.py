"""Reads the rows of tables of prompts: text, JSON, CSV and parquet, each row with where it stands."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.pictures import is_picture_column
from ngrpo_lora.records.texts import decoded, parse_json, separator

if TYPE_CHECKING:
    import pyarrow

__all__ = ["TABLES", "Rows", "file_rows", "lines_of", "needs", "numbered", "path_and_column", "plain_columns", "reason"]

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # which have columns; all else is text, a prompt a line

Rows = Iterable[tuple[str, Any]]  # where a row stands, and the row: text, or cells by column


def path_and_column(source: str) -> tuple[str, str]:
    """The file that a source names, and the column after its last `#`; a file of the whole name goes first."""
    if "#" in source and not os.path.exists(source):
        path, _, column = source.rpartition("#")
        return path, column
    return source, ""


def file_rows(data: bytes, path: str) -> Rows:
    """The rows of a file by the ending of its name; of one that is no table but text, its lines.

    Raises:
        ConfigError: it is not what its name says, or not UTF-8.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return _parquet(data, path)
    try:
        text = decoded(data, path)
    except ValueError as error:
        raise ConfigError(f"must be a UTF-8 text file, but {error}; save it as UTF-8") from None
    match suffix:
        case ".jsonl":
            return _json_lines(text, path)
        case ".json":
            return _json_array(text, path)
        case ".csv" | ".tsv":
            return _csv(text, path, "\t" if suffix == ".tsv" else separator(text))
    return _lines(text)


def lines_of(text: str) -> list[str]:
    """The lines of a text; `str.splitlines` also breaks at characters that JSON and prompts may hold."""
    return re.split(r"\r\n?|\n", text.removesuffix("\n").removesuffix("\r"))


def _lines(text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines_of(text), 1):
        yield f"line {number}", line


def _json_lines(text: str, path: str) -> Rows:
    for place, line in _lines(text):
        try:
            yield place, parse_json(line) if line.strip() else line
        except ValueError as error:
            raise ConfigError(
                f"must hold a JSON object or string on every line, but {place} of {path!r} is not JSON: "
                f"{error}; correct the line"
            ) from None


def _json_array(text: str, path: str) -> Rows:
    try:
        rows = parse_json(text or "[]")
    except ValueError as error:
        raise ConfigError(f"must be JSON, but {path!r} is not: {error}; correct it") from None
    if not isinstance(rows, list):
        raise ConfigError(f"must be a JSON array of objects or strings, but {path!r} is not one")
    return ((f"entry {number}", row) for number, row in enumerate(rows, 1))


def _csv(text: str, path: str, delimiter: str) -> Rows:
    reader, last = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 0
    try:
        header = next((row for row in reader if row), [])
        _check_columns([name for name in header if name.strip()], path)
        for row in reader:
            last = reader.line_num
            if len(row) > len(header):
                raise ConfigError(
                    f"must have as many cells in a row as in its header, but line {last} of {path!r} has more; "
                    "put a cell that holds the separator in quotes"
                )
            if row:
                yield f"line {last}", dict(zip_longest(header, row))
    except csv.Error as error:
        raise ConfigError(
            f"must be a table, but {path!r} is faulty after line {last}: {error}; check its quotes"
        ) from None


def _check_columns(names: Sequence[str], path: str) -> None:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(
            f"must have every column once, but {path!r} has {', '.join(map(repr, twice))} twice; rename one of them"
        )


def _parquet(data: bytes, path: str) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(needs("pyarrow", path)) from None
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        _check_columns(file.schema_arrow.names, path)
        rows = file.read(plain_columns(file.schema_arrow)).to_pylist()
    except ConfigError:
        raise
    except UnicodeDecodeError:
        raise ConfigError(f"must hold UTF-8 text, but {path!r} has text that is not; write it anew as UTF-8") from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"must be a parquet file, but {path!r} is not: {reason(error)}") from None
    return numbered(rows)


def plain_columns(schema: pyarrow.Schema) -> list[str]:
    """Columns of text, numbers, truth values and lists or structures of them, and source pictures: no dates."""
    from pyarrow import types

    def is_plain(kind: pyarrow.DataType) -> bool:
        if types.is_nested(kind):
            return all(is_plain(kind.field(i).type) for i in range(kind.num_fields))
        if types.is_dictionary(kind):
            return is_plain(kind.value_type)
        texts = (types.is_string, types.is_large_string, types.is_string_view)
        others = (types.is_boolean, types.is_integer, types.is_floating, types.is_null)
        return any(check(kind) for check in (*texts, *others))

    def holds_pictures(kind: pyarrow.DataType) -> bool:
        names = {kind.field(i).name for i in range(kind.num_fields)} if types.is_struct(kind) else set()
        return types.is_binary(kind) or types.is_large_binary(kind) or names == {"bytes", "path"}

    return [f.name for f in schema if is_plain(f.type) or is_picture_column(f.name) and holds_pictures(f.type)]


def numbered(rows: list[dict[str, Any]]) -> Rows:
    """Rows that have no lines, by their numbers."""
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def needs(package: str, source: str) -> str:
    """What to say of a source that cannot be read without a package."""
    remedy = "pip install datasets"
    return f"must be readable here, but {source!r} needs {package}, which is not installed; {remedy}"


def reason(error: Exception) -> str:
    """The first line of what an error says, to be put in a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
