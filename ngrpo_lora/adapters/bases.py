"""The bases that adapters were trained on, as their headers say: what is used together should share one."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ngrpo_lora.adapters.contents import close, fused_digests
from ngrpo_lora.adapters.reading import AdapterFile
from ngrpo_lora.adapters.report import header_value, mapping, numbers
from ngrpo_lora.world import MODELS

__all__ = ["base_of", "lacking", "warn_of_bases", "warn_of_use"]

log = logging.getLogger(__name__)


def base_of(header: Mapping[str, str]) -> str | None:
    """The model that one of our own adapters was trained on, with what it had taken in, in words; None for others."""
    model = mapping(header_value(header, "ngrpo", {}), "model")
    if "path" not in model:
        return None
    revision = f" at {model['revision']}" if model.get("revision") else ""
    fused = [f" + {strength:g} x {name}" for name, strength in numbers(mapping(model, "fuse")).items()]
    return "".join([str(model["path"]), revision, *fused])


def warn_of_bases(files: Iterable[AdapterFile]) -> bool:
    """Say once which adapters, of those that are used together, were trained on which of several bases.

    Returns:
        Whether there was something to say.
    """
    bases = {file.path: base for file in files if (base := base_of(file.metadata))}
    if len({*bases.values()}) > 1:
        shown = ", ".join(f"{path} on {base}" for path, base in bases.items())
        remedy = "use those of one base, unless you mean to mix them"
        log.warning("adapters were trained on different bases (%s), and may do less on another; %s", shown, remedy)
    return len({*bases.values()}) > 1


def lacking(file: AdapterFile, beside: Collection[str], taken: Mapping[str, float]) -> dict[str, float]:
    """Files beside which an adapter was trained and that a base has not taken in, with their strengths by name.

    Args:
        beside: names, as in `model.fuse`, of files that it has taken in.
        taken: files that it has taken in, under whatever name, with strengths by digest.
    """
    fused = fused_digests(file.metadata)
    works_beside = numbers(mapping(mapping(header_value(file.metadata, "ngrpo", {}), "model"), "fuse"))
    return {name: one for name, one in works_beside.items() if name not in beside and fused.get(name) not in taken}


def warn_of_use(
    files: Iterable[AdapterFile], base: str, beside: Collection[str], taken: Mapping[str, float], remedy: str
) -> None:
    """Say which of our own adapters were trained on another base than they are used on, or beside files that it lacks.

    A folder of a user's own may hold any weights: what it is called says nothing.

    Args:
        base: the model that they are used on.
        beside, taken: what it has taken in, as in `lacking`.
        remedy: what to do about files that it lacks.
    """
    for file in files:
        model = mapping(header_value(file.metadata, "ngrpo", {}), "model")
        own = str(model.get("path", base))
        if own != base and all(path in MODELS or not Path(path).exists() for path in (own, base)):
            log.warning("adapter %s was trained on %s, and may do less on %s", file.path, own, base)
        if missing := lacking(file, beside, taken):
            what = f"works beside {', '.join(missing)}, which {base} has not taken in"
            log.warning("adapter %s %s; %s", file.path, what, remedy)
        fused = fused_digests(file.metadata)
        for name, strength in numbers(mapping(model, "fuse")).items():
            here = taken.get(fused.get(name, ""), strength)
            if not close(here, strength):
                what = f"works beside {name} at {strength:g}, which {base} has taken in at {here:g}"
                log.warning("adapter %s %s; its pictures may be worse there", file.path, what)
