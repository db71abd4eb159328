"""The files that a run is made from beside its configuration, and whether they are still the same when it goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ngrpo_lora import registry
from ngrpo_lora.adapters.finding import find_adapter
from ngrpo_lora.config import RunConfig, named_functions
from ngrpo_lora.prompts.sources import needed_prompts, read_split
from ngrpo_lora.prompts.tables import path_and_column
from ngrpo_lora.records.files import digest, written

__all__ = ["changed_inputs", "input_files", "warn_of_changes"]

log = logging.getLogger(__name__)

FILE = "inputs.json"
READERS = 8  # threads


def input_files(config: RunConfig) -> dict[str, Path]:
    """Local files of the base's LoRAs, prompts, rewards and measures, by the configuration's key that names them."""
    return {key: path for key, path in _named(config) if path.is_file()}


def _named(config: RunConfig) -> Iterator[tuple[str, Path]]:
    for adapter in config.model.fuse:
        yield f"model.fuse ({adapter})", find_adapter(adapter) if Path(adapter).exists() else Path(adapter)
    for key, source in _sources(config):
        yield f"{key} ({source})", Path(path_and_column(source)[0])
    for key, reference in named_functions(config).items():
        target, _ = registry.split_reference(reference)
        if target.endswith(".py"):
            yield f"{key.removesuffix('.name')} ({reference})", Path(target)


def _sources(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The sources of prompts, each after its key."""
    for key, sources in (("prompts.train", config.prompts.train), ("prompts.held_out", config.prompts.held_out)):
        names = [sources] if isinstance(sources, str) else [*sources] if isinstance(sources, dict) else []
        yield from ((key, source) for source in names)


def _is_local(source: str) -> bool:
    """Whether prompts are of a file, or of a dataset's folder, which may name files."""
    folder = source.removeprefix("hf:").partition("#")[0].partition("?")[0]
    return Path(path_and_column(source)[0]).is_file() or (source.startswith("hf:") and Path(folder).is_dir())


def input_pictures(config: RunConfig) -> dict[str, dict[str, str]]:
    """Digests of the picture files that a run edits or judges by, by their names, by key and table of prompts.

    Raises:
        ConfigError: a table or a picture cannot be read.
    """
    if not any(_is_local(source) for _, source in _sources(config)):
        return {}
    split = read_split(config.prompts)
    tables = [(key, name, table) for key, part in split._asdict().items() for name, table in part.items()]
    if not any(prompt.source for _, _, table in tables for prompt in table.prompts):
        return {}
    needed = {key: {prompt.key for prompt in prompts} for key, prompts in needed_prompts(config, split).items()}
    found: dict[str, dict[str, str]] = {}
    with ThreadPoolExecutor(READERS) as readers:
        for key, name, table in tables:
            taken = (one for one in table.prompts if one.source is not None and one.key in needed[f"prompts.{key}"])
            pictures = [one for prompt in taken for one in (prompt.source, prompt.mask) if one is not None]
            files = [*dict.fromkeys(one for one in pictures if isinstance(one.content, Path))]
            digests = readers.map(lambda one: one.digest, files)
            if files:
                names = [one.name for one in files]
                found[f"pictures of prompts.{key} ({name})"] = dict(zip(names, digests, strict=True))
    return found


def _known(output_dir: Path) -> dict[str, Any]:
    """Digests that a run wrote down, by key; empty where it has none that can be read."""
    try:
        return json.loads((output_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _others(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys of the files whose digests are others than before."""
    return [key for key in now if before.get(key, now[key]) != now[key]]


def changed_inputs(config: RunConfig, output_dir: Path) -> list[str]:
    """Keys of the input files that are others by now than when a run last began or went on; pictures are not read."""
    return _others(_known(output_dir), {key: digest(file) for key, file in input_files(config).items()})


def warn_of_changes(config: RunConfig, output_dir: Path, resumed: bool) -> None:
    """Write down what the input files hold, and say which of them have changed since a resumed run was started."""
    path = output_dir / FILE
    now: dict[str, Any] = {key: digest(file) for key, file in input_files(config).items()}
    pictures = input_pictures(config)
    if resumed and path.is_file():
        before = _known(output_dir)
        for key in _others(before, now):
            log.warning("%s has changed since this run began: what follows is made with the file as it is now", key)
        for key, files in pictures.items():
            known = before.get(key, {})  # a run that goes on for longer may need others too
            if changed := [name for name in files if known.get(name, files[name]) != files[name]]:
                log.warning(
                    "%s: %d of %d have changed since this run began, first %r: what follows is made with them as they "
                    "are now",
                    *(key, len(changed), len(files), changed[0]),
                )
    with written(path) as partial:
        partial.write_text(json.dumps(now | pictures, indent=1) + "\n", encoding="utf-8")
