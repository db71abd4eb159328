"""The files that a run is made from beside its configuration, and whether they are still the same when it goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from ngrpo_lora import registry
from ngrpo_lora.adapters.finding import find_adapter
from ngrpo_lora.config import RunConfig, named_functions
from ngrpo_lora.records.files import digest, written

__all__ = ["input_files", "warn_of_changes"]

log = logging.getLogger(__name__)

FILE = "inputs.json"


def input_files(config: RunConfig) -> dict[str, Path]:
    """Local files of the base's LoRAs, prompts, rewards and measures, by the configuration's key that names them."""
    return {key: path for key, path in _named(config) if path.is_file()}


def _named(config: RunConfig) -> Iterator[tuple[str, Path]]:
    for adapter in config.model.fuse:
        yield f"model.fuse ({adapter})", find_adapter(adapter) if Path(adapter).exists() else Path(adapter)
    for key, sources in (("prompts.train", config.prompts.train), ("prompts.held_out", config.prompts.held_out)):
        names = [sources] if isinstance(sources, str) else [*sources] if isinstance(sources, dict) else []
        for source in names:
            yield f"{key} ({source})", Path(source.partition("#")[0])
    for key, reference in named_functions(config).items():
        target, _ = registry.split_reference(reference)
        if target.endswith(".py"):
            yield f"{key.removesuffix('.name')} ({reference})", Path(target)


def warn_of_changes(config: RunConfig, output_dir: Path, resumed: bool) -> None:
    """Write down what the input files hold, and say which of them have changed since a resumed run was started."""
    path = output_dir / FILE
    now = {key: digest(file) for key, file in input_files(config).items()}
    if resumed and path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        for key in (key for key in now if before.get(key, now[key]) != now[key]):
            log.warning("%s has changed since this run began: what follows is made with the file as it is now", key)
    with written(path) as partial:
        partial.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
