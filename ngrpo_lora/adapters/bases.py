"""The bases that adapters were trained on, as their headers say: what is used together should share one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from ngrpo_lora.adapters.reading import AdapterFile
from ngrpo_lora.adapters.report import header_value, mapping, numbers

__all__ = ["base_of", "warn_of_bases"]

log = logging.getLogger(__name__)


def base_of(header: Mapping[str, str]) -> str | None:
    """The model that one of our own adapters was trained on, with what it had taken in, in words; None for others."""
    model = mapping(header_value(header, "ngrpo", {}), "model")
    if "path" not in model:
        return None
    revision = f" at {model['revision']}" if model.get("revision") else ""
    fused = [f" + {strength:g} x {name}" for name, strength in numbers(mapping(model, "fuse")).items()]
    return "".join([str(model["path"]), revision, *fused])


def warn_of_bases(files: Iterable[AdapterFile]) -> None:
    """Say once which adapters, of those that are used together, were trained on which of several bases."""
    bases = {file.path: base for file in files if (base := base_of(file.metadata))}
    if len({*bases.values()}) > 1:
        shown = ", ".join(f"{path} on {base}" for path, base in bases.items())
        remedy = "use those of one base, unless you mean to mix them"
        log.warning("adapters were trained on different bases (%s), and may do less on another; %s", shown, remedy)
