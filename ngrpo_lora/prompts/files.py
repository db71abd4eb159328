"""Prompts from files and datasets: every source becomes rows, every row a `Prompt`.

    mine.txt                               one prompt a line
    mine.jsonl, mine.json                  strings, or objects with a prompt; GenEval's evaluation_metadata.jsonl is one
    mine.csv, mine.tsv, mine.parquet       a column of prompts
    hf:owner/name                          a dataset of the Hugging Face Hub, or a folder: hf:./folder
    hf:owner/name?split=test&config=v2&revision=main     its split (default: train), configuration and revision
    hpdv2:train, hpdv2:test, hpdv2:test/anime            the Human Preference Dataset v2

The column is `prompt`, `caption` or `text`, in any case, else the one after a `#`: `mine.csv#Title`,
`hf:owner/name?split=test#Title`. The others are the prompt's metadata, as far as JSON can hold them and where they are
not null; those of CSV are text. Blank rows are skipped, and what cannot be seen at a prompt's ends is no part of it.

A column `source` names the picture that the prompt edits, for a model that edits: a path that counts from the folder of
the prompts, or a `file://` URL. In parquet files and datasets it may hold pictures themselves; a dataset's column of
another name is an option: `hf:owner/name?source=input_image`. A column `mask` may name a picture of the source's size
that is white where it may change, for rewards. `pictures.py` says which pictures are taken.

HPDv2 (arXiv 2306.09341, Apache-2.0): the 103,700 training prompts are those of `train.json` (116 MB) in the Hub's
`ymhao/HPDv2`; the 4 x 800 test prompts are the benchmark files of `zhwang/HPDv2`, where the `hpsv2` package has them
from, with their style as metadata.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.pictures import SourcePicture, is_picture_column, sole_column, take_pictures
from ngrpo_lora.records.texts import decoded, parse_json, separator
from ngrpo_lora.world.edits import EDIT_TASKS
from ngrpo_lora.world.scenes import TASKS

if TYPE_CHECKING:
    import pyarrow

__all__ = ["BUILTIN_SOURCES", "Prompt", "PromptTable", "as_prompt", "prompt_key", "read_prompts"]

TASKS_OF = {"world:train": TASKS, "world:held_out": TASKS, "edits:train": EDIT_TASKS, "edits:held_out": EDIT_TASKS}
BUILTIN_SOURCES = (*TASKS_OF, *(f"{split}/{task}" for split, tasks in TASKS_OF.items() for task in tasks))

COLUMNS = ("prompt", "caption", "text")
SOURCE = "source"
HUB_OPTIONS = ("split", "config", "revision", SOURCE)

HPDV2_TRAIN = ("ymhao/HPDv2", "bb0f2563e451e11c3f376b2ba93615db00e042e1")
HPDV2_TEST = ("zhwang/HPDv2", "b9517430f34b1080d4f741118d2a440155a165cd")
HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
HPDV2_SOURCES = ("hpdv2:train", "hpdv2:test", *(f"hpdv2:test/{style}" for style in HPDV2_STYLES))

INVISIBLE = "\ufeff\u200b\u2060"  # byte order marks of files that were joined, and spaces without width

Rows = Iterable[tuple[str, Any]]  # where a row stands, and the row: text, or cells by column


class Prompt(NamedTuple):
    """The text of a prompt, the metadata that rewards get with it, and of an edit the source and perhaps its mask.

    place: where it stands, for messages; none where it is of no file or dataset.
    """

    text: str
    metadata: dict[str, Any] = {}
    source: SourcePicture | None = None
    mask: SourcePicture | None = None
    place: str = ""

    def shown(self, size: tuple[int, int]) -> dict[str, Any]:
        """The metadata as rewards get it: of an edit with `source` and `mask` as PIL pictures of (width, height).

        Raises:
            ConfigError: one of them cannot be read.
        """
        if self.source is None:
            return self.metadata
        mask = {} if self.mask is None else {"mask": self.mask.fitted(*size)}
        return self.metadata | {"source": self.source.fitted(*size)} | mask

    @property
    def told(self) -> str:
        """The beginning of the text and where it stands, for messages."""
        return f"{self.text!r:.120}" + (f" ({self.place})" if self.place else "")

    @property
    def key(self) -> str:
        """What equal prompts have in common: the text's `prompt_key`, and the source."""
        text = prompt_key(self.text)
        return text if self.source is None else f"{text}\x1f{self.source.origin}"

    @property
    def condition(self) -> str:
        """What a model is given, as a string: the text, and the digest of the source."""
        return self.text if self.source is None else f"{self.text}\x1f{self.source.digest}"


def as_prompt(prompt: str | Prompt) -> Prompt:
    """A prompt, of a text one without metadata or source."""
    return Prompt(prompt) if isinstance(prompt, str) else prompt


@dataclass(frozen=True)
class PromptTable:
    """The prompts of one source, in its order, and how many rows were left out."""

    prompts: list[Prompt]
    num_blank: int = 0
    num_duplicates: int = 0


def prompt_key(text: str) -> str:
    """The form in which equal prompts agree: NFKC, without case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def read_prompts(source: str, deduplicate: bool = True) -> PromptTable:
    """All prompts of a file or a dataset.

    Args:
        source: one of the forms that head this module.
        deduplicate: keep only the first of several prompts with the same `Prompt.key`.
    Raises:
        ConfigError: no such source, not readable, not what its name says, no column of prompts, or no prompt in it.
    """
    rows, column = _rows(source)
    folder = _folder(source)
    prompts: list[Prompt] = []
    num_blank = 0
    for number, row in rows:
        text, metadata, pictures, place = row, {}, {}, f"{number} of {source!r}"
        if isinstance(row, dict):
            name = _column(row, column, place)
            text = row[name]
            others = {key: value for key, value in row.items() if key != name}
            pictures = take_pictures(others, folder, place)
            metadata = {key: value for key, value in others.items() if value is not None}
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"must hold prompts as text, but {place} holds {reprlib.repr(text)}")
        if text := _visible(text or ""):
            prompts.append(Prompt(text, metadata, **pictures, place=place))
        else:
            num_blank += 1
        if "\0" in text:
            raise ConfigError(f"must hold text, but {place} holds a NUL character; leave it out")
    if not prompts:
        raise ConfigError(f"must hold at least one prompt, but {source!r} is empty")
    kept = list({prompt.key: prompt for prompt in reversed(prompts)}.values())[::-1]
    if not deduplicate or len(kept) == len(prompts):
        return PromptTable(prompts, num_blank)
    return PromptTable(kept, num_blank, len(prompts) - len(kept))


def _visible(text: str) -> str:
    """A text without spaces and invisible characters at its ends."""
    while (shorter := text.strip().strip(INVISIBLE)) != text:
        text = shorter
    return text


def _folder(source: str) -> Path:
    """The folder from which paths in a file or a dataset's folder count; on the Hub there is none, and no such path."""
    if source.startswith("hf:"):
        return Path(source.removeprefix("hf:").partition("#")[0].partition("?")[0])
    return Path(source if os.path.exists(source) else source.rpartition("#")[0] or source).parent


def _rows(source: str) -> tuple[Rows, str]:
    """The rows of a source, and the column that it names."""
    if source in HPDV2_SOURCES:
        return _hpdv2(source), ""
    if source.startswith("hf:"):
        name, _, column = source.removeprefix("hf:").partition("#")
        return _hub_dataset(name), column
    path, column = source, ""
    if "#" in source and not os.path.exists(source):
        path, _, column = source.rpartition("#")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ConfigError(
            f"must be a file, which is read more than once, but {path!r} is a pipe or a device; save it to a file first"
        )
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        close = difflib.get_close_matches(source, BUILTIN_SOURCES + HPDV2_SOURCES, n=1, cutoff=0.8)
        raise ConfigError(
            f"must be {', '.join(TASKS_OF)}, one task of them ({BUILTIN_SOURCES[4]}), hpdv2:train, hpdv2:test, "
            f"hf:owner/name or a text file (.txt, .jsonl, .csv, .tsv, .parquet), but there is no file {path!r}"
            + (f"; did you mean {close[0]}?" if close else "")
        ) from None
    except OSError as error:
        raise ConfigError(f"must be a readable text file, but {path!r} is not: {error.strerror}") from None
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return _parquet(data, path), column
    try:
        text = decoded(data, path)
    except ValueError as error:
        raise ConfigError(f"must be a UTF-8 text file, but {error}; save it as UTF-8") from None
    match suffix:
        case ".jsonl":
            return _json_lines(text, path), column
        case ".json":
            return _json_array(text, path), column
        case ".csv" | ".tsv":
            return _csv(text, path, "\t" if suffix == ".tsv" else separator(text)), column
    if column:
        raise ConfigError(f"must name a column only of a table, but {path!r} is a text file; drop #{column}")
    return _lines(text), column


def _column(row: dict[str, Any], wanted: str, place: str) -> str:
    """The name of the column of prompts: the wanted one, else the first of `COLUMNS` that is there."""
    if wanted and wanted in row:  # a header that ends with a separator has a column without a name
        return wanted
    if not wanted:
        for known in COLUMNS:
            remedy = "name the one of the prompts after the source, with #{}"
            if (found := sole_column(row, known, place, remedy)) is not None:
                return found
        raise ConfigError(
            f"must have a column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}, but {place} has "
            f"{', '.join(row) or 'none'}; name another one after the source, with #COLUMN"
        )
    close = difflib.get_close_matches(wanted, row, n=1)
    hint = f"; did you mean #{close[0]}?" if close else f"; name one of them with #{next(iter(row), 'COLUMN')}"
    raise ConfigError(f"must have the column {wanted!r}, but {place} has {', '.join(row) or 'none'}{hint}")


def _lines(text: str) -> Iterator[tuple[str, str]]:
    # Not str.splitlines, which also breaks at characters that JSON and prompts may hold.
    for number, line in enumerate(re.split(r"\r\n?|\n", text.removesuffix("\n").removesuffix("\r")), 1):
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
        raise ConfigError(_needs("pyarrow", path)) from None
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        _check_columns(file.schema_arrow.names, path)
        rows = file.read(_plain_columns(file.schema_arrow)).to_pylist()
    except ConfigError:
        raise
    except UnicodeDecodeError:
        raise ConfigError(f"must hold UTF-8 text, but {path!r} has text that is not; write it anew as UTF-8") from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"must be a parquet file, but {path!r} is not: {_first_line(error)}") from None
    return _numbered(rows)


def _hub_dataset(name: str) -> Rows:
    """One split of a dataset, through the `datasets` library: from the Hub, its cache, or a folder."""
    path, _, query = name.partition("?")
    options = {key: value for key, _, value in (option.partition("=") for option in query.split("&") if option)}
    if not path or not options.keys() <= set(HUB_OPTIONS):
        raise ConfigError(
            f"must look like hf:owner/name?split=train&config=en#column ({', '.join(HUB_OPTIONS)}), got 'hf:{name}'"
        )
    try:
        import datasets
        import datasets.exceptions
    except ImportError:
        raise ConfigError(_needs("datasets", f"hf:{name}")) from None
    try:
        dataset = datasets.load_dataset(
            path, options.get("config"), split=options.get("split", "train"), revision=options.get("revision")
        )
        if SOURCE in options:
            dataset = dataset.rename_column(options[SOURCE], SOURCE)
        columns = _plain_columns(dataset.features.arrow_schema)
        table: Any = dataset.select_columns(columns).with_format("arrow")[:]
        rows = table.to_pylist()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"must be a dataset that can be loaded, but 'hf:{name}' cannot: {_first_line(error)}; correct its name, "
            "split, config or revision, or the connection to the Hub"
        ) from None
    return _numbered(rows)


def _plain_columns(schema: pyarrow.Schema) -> list[str]:
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


def _numbered(rows: list[dict[str, Any]]) -> Rows:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _hpdv2(source: str) -> Rows:
    from ngrpo_lora.downloads import download

    def load(repo: str, revision: str, file: str) -> Any:
        try:
            path = download(repo, file, revision, "dataset")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"must be reachable, but {source!r} needs {file} of the Hub's {repo}, which cannot be had: "
                f"{_first_line(error)}; check the connection, or HF_ENDPOINT and HF_HOME"
            ) from None
        return json.loads(Path(path).read_bytes())

    if source == "hpdv2:train":  # a row for every comparison
        yield from (
            ("train.json", text) for text in dict.fromkeys(row["prompt"] for row in load(*HPDV2_TRAIN, "train.json"))
        )
        return
    for style in HPDV2_STYLES:
        if source in ("hpdv2:test", f"hpdv2:test/{style}"):
            for text in load(*HPDV2_TEST, f"benchmark/{style}.json"):
                yield f"{style}.json", {"prompt": text, "style": style}


def _needs(package: str, source: str) -> str:
    remedy = "pip install datasets"
    return f"must be readable here, but {source!r} needs {package}, which is not installed; {remedy}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
