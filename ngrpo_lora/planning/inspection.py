"""What `ngrpo prompts inspect` shows: how many prompts there are, how long they are, and what training draws first."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.prompts.checking import check_sources, warn_of_cropping
from ngrpo_lora.prompts.files import BUILTIN_SOURCES, Prompt, PromptTable, read_prompts
from ngrpo_lora.prompts.pictures import SourcePicture
from ngrpo_lora.prompts.sources import divide, open_prompts, token_lengths
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.world import MODELS

__all__ = ["inspect_sources", "load_tokenizers"]

NUM_DRAWN = 1000  # of an endless source


def inspect_sources(
    sources: Sequence[str], model: str | None, held_out: float | None, seed: int, num_shown: int
) -> Group:
    """A column of figures for each source, then the first prompts that a run on them would train on.

    Args:
        model: whose tokenizers count tokens, and for which sources are checked: `embedded`, a diffusers folder or a Hub
            id; None: neither is done.
        held_out: fraction of the prompts that is held out; None: nothing is.
        seed: seed of the run, `seed` in its configuration.
    Raises:
        ConfigError: as `read_prompts` and `check_sources`, or a fraction that cannot be held out.
        UserError: as `load_tokenizers`, or the model is of no known family.
    """
    if held_out is not None and not 0 < held_out < 1:
        raise ConfigError(f"--held-out must be more than 0 and less than 1, got {held_out:g}")
    run_seed = derive_seed(seed, "prompts")  # as the trainer derives it
    tokenizers = {} if model is None else load_tokenizers(model)
    columns: list[dict[str, str]] = []
    tables: dict[str, PromptTable] = {}
    read = {source: _read(source, run_seed) for source in sources}
    sizes = {} if model is None else _check(model, read)
    for source in sources:
        table = read[source]
        column = _figures(table, source in BUILTIN_SOURCES, tokenizers, sizes)
        if held_out is not None:
            train, kept = _divide(source, table, held_out)
            column["train / held out"] = f"{len(train):,} / {len(kept):,}"
            table = PromptTable(train)
        tables[source] = table
        columns.append(column)

    figures = Table("", *map(escape, sources), box=None, pad_edge=False)
    for name in columns[0]:
        figures.add_row(name, *(Text(column[name]) for column in columns))
    alone = len(sources) == 1
    order = open_prompts(sources[0] if alone else dict.fromkeys(sources, 1), run_seed, tables)
    title = f"\nThe first {num_shown} prompts of a run with seed={seed}{'' if alone else ', sources of equal weight'}:"
    return Group(figures, Text(title), *(_line(i, order.prompt(i)) for i in range(num_shown)))


def load_tokenizers(model: str) -> dict[str, Any]:
    """The tokenizers of a diffusers pipeline by their folders' names; no weights are loaded.

    Raises:
        UserError: no such folder or Hub model, or not in diffusers' form.
    """
    from transformers import AutoTokenizer

    from ngrpo_lora.downloads import download

    path = MODELS.get(model, Path(model))
    try:
        if path.is_dir():
            index, name = path / "model_index.json", str(path)
        else:
            index, name = Path(download(model, "model_index.json")), model
        folders = [key for key in json.loads(index.read_bytes()) if key.startswith("tokenizer")]
        return {folder: AutoTokenizer.from_pretrained(name, subfolder=folder) for folder in folders}
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model must be {' or '.join(MODELS)}, a diffusers folder or a Hub id (owner/name), but the tokenizers "
            f"of {model!r} could not be loaded: {error}"
        ) from error


def _read(source: str, seed: int) -> PromptTable:
    """All prompts of a source; of an endless one the first `NUM_DRAWN`."""
    if source in BUILTIN_SOURCES:
        endless = open_prompts(source, seed)
        return PromptTable([endless.prompt(i) for i in range(NUM_DRAWN)])
    try:
        return read_prompts(source)
    except ConfigError as error:
        raise ConfigError(f"SOURCE {error}") from None


def _check(model: str, tables: Mapping[str, PromptTable]) -> dict[SourcePicture, tuple[int, int]]:
    """The sizes of all sources; a model that both draws and edits is checked as one that edits where there is one."""
    from ngrpo_lora.models._loading import family_class  # diffusers is slow to import
    from ngrpo_lora.sampling.settings import editing, own_settings

    prompts = [prompt for table in tables.values() for prompt in table.prompts]
    try:
        drawn = own_settings(model)
        edits = family_class(editing(drawn, prompts).model).edits
    except UserError as error:
        raise UserError(str(error).replace("model.path", "--model")) from None
    sizes = check_sources("SOURCE", prompts, edits, model)
    warn_of_cropping("SOURCE", sizes, (drawn.model.width_px, drawn.model.height_px))
    return sizes


def _divide(source: str, table: PromptTable, held_out: float) -> tuple[list[Prompt], list[Prompt]]:
    if source in BUILTIN_SOURCES:
        raise ConfigError(f"--held-out must divide files or datasets, but {source} is neither; drop one of them")
    try:
        return divide(table.prompts, held_out)
    except ConfigError as error:
        raise ConfigError(f"--held-out={held_out:g} of {source!r} {error}") from None


def _figures(
    table: PromptTable, endless: bool, tokenizers: dict[str, Any], sizes: Mapping[SourcePicture, tuple[int, int]]
) -> dict[str, str]:
    texts = [prompt.text for prompt in table.prompts]
    rows = len(texts) + table.num_duplicates + table.num_blank
    keys = dict.fromkeys(key for prompt in table.prompts for key in prompt.metadata)
    figures = {
        "rows": "endless" if endless else f"{rows:,}",
        "distinct prompts": f"{len(set(texts)):,}" + (f" of the first {NUM_DRAWN:,}" if endless else ""),
        "duplicates dropped": f"{table.num_duplicates:,}",
        "blank rows skipped": f"{table.num_blank:,}",
        "metadata": ", ".join(keys) or "none",
        "source pictures": _sources([prompt.source for prompt in table.prompts if prompt.source is not None], sizes),
        "words": _spread([len(text.split()) for text in texts]),
        "characters": _spread([len(text) for text in texts]),
    }
    for name, tokenizer in tokenizers.items():
        lengths, limit = token_lengths(texts, tokenizer), tokenizer.model_max_length
        longer = sum(length > limit for length in lengths)
        share = f"{longer:,} ({longer / len(lengths):.1%}) over its limit of {limit:,}"
        figures[f"tokens of {name}"] = f"{_spread(lengths)}; {share}"
    return figures


def _sources(sources: Sequence[SourcePicture], sizes: Mapping[SourcePicture, tuple[int, int]]) -> str:
    """How many different ones there are, and where they were read the smallest and the largest size."""
    found = f"{len(set(sources)):,}" if sources else "none"
    if not (known := sorted((sizes[source] for source in set(sources) & sizes.keys()), key=math.prod)):
        return found
    shown = dict.fromkeys(f"{width} x {height}" for width, height in (known[0], known[-1]))
    return f"{found}, {' to '.join(shown)} px"


def _spread(lengths: Sequence[int]) -> str:
    return f"{min(lengths):,} to {max(lengths):,}, median {statistics.median(lengths):g}"


def _line(index: int, prompt: Prompt) -> Text:
    line = Text(f"{index:4d}  {prompt.text}")
    return line.append(f"  {json.dumps(prompt.metadata, ensure_ascii=False)}", style="dim") if prompt.metadata else line
