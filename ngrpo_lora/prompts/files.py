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

import difflib
import json
import os
import reprlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.pictures import SourcePicture, sole_column, take_pictures
from ngrpo_lora.prompts.tables import TABLES, Rows, file_rows, needs, numbered, path_and_column, plain_columns, reason
from ngrpo_lora.world.edits import EDIT_TASKS
from ngrpo_lora.world.scenes import TASKS

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

DIGEST_LENGTH = 16  # hexadecimal digits of a digest that are kept
INVISIBLE = "\ufeff\u200b\u2060"  # byte order marks of files that were joined, and spaces without width


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
    def asked(self) -> str:
        """What a model is asked for, as a string: the text's `prompt_key`, and the source by its name."""
        text = prompt_key(self.text)
        return text if self.source is None else f"{text}\x1f{self.source.origin}"

    @property
    def key(self) -> str:
        """What equal prompts have in common: what a model is asked for, and the mask by which rewards judge an edit."""
        judged = None if self.source is None else self.mask
        return self.asked if judged is None else f"{self.asked}\x1f{judged.origin}"

    @property
    def pictures(self) -> str:
        """A short digest of the source of an edit, and of its mask; empty where text and place in its source tell all.

        Those that the package renders are told by their seed, and not by the bytes that a library's version makes.

        Raises:
            ConfigError: one of them cannot be read.
        """
        if self.source is None or not self.place:
            return ""
        return "+".join(one.digest[:DIGEST_LENGTH] for one in (self.source, self.mask) if one is not None)

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
    return Path(path_and_column(source)[0]).parent


def _rows(source: str) -> tuple[Rows, str]:
    """The rows of a source, and the column that it names."""
    if source in HPDV2_SOURCES:
        return _hpdv2(source), ""
    if source.startswith("hf:"):
        name, _, column = source.removeprefix("hf:").partition("#")
        return _hub_dataset(name), column
    path, column = path_and_column(source)
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
        if os.path.isdir(path):
            raise ConfigError(_is_folder(path)) from None
        raise ConfigError(f"must be a readable text file, but {path!r} is not: {error.strerror}") from None
    if column and Path(path).suffix.lower() not in TABLES:
        raise ConfigError(f"must name a column only of a table, but {path!r} is a text file; drop #{column}")
    return file_rows(data, path), column


def _is_folder(path: str) -> str:
    """What to say of a folder, which may be one of pictures."""
    name = path if os.path.isabs(path) else f".{os.sep}{os.path.normpath(path)}"
    return (
        f"must be a file or a dataset, but {path!r} is a folder; name a file in it, or, where its metadata.jsonl says "
        f"the prompt of each picture, hf:{name}, and to edit the pictures hf:{name}?source=image"
    )


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
        raise ConfigError(needs("datasets", f"hf:{name}")) from None
    try:
        dataset = datasets.load_dataset(
            path, options.get("config"), split=options.get("split", "train"), revision=options.get("revision")
        )
        if SOURCE in options:
            dataset = dataset.rename_column(options[SOURCE], SOURCE)
        columns = plain_columns(dataset.features.arrow_schema)
        table: Any = dataset.select_columns(columns).with_format("arrow")[:]
        rows = table.to_pylist()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"must be a dataset that can be loaded, but 'hf:{name}' cannot: {reason(error)}; correct its name, "
            "split, config or revision, or the connection to the Hub"
        ) from None
    return numbered(rows)


def _hpdv2(source: str) -> Rows:
    from ngrpo_lora.downloads import download

    def load(repo: str, revision: str, file: str) -> Any:
        try:
            path = download(repo, file, revision, "dataset")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"must be reachable, but {source!r} needs {file} of the Hub's {repo}, which cannot be had: "
                f"{reason(error)}; check the connection, or HF_ENDPOINT and HF_HOME"
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
