"""What LoRA files and bases hold already: which files were added up in them, and at which strengths, by their digests.

`ngrpo merge` writes that into the header of what it makes (`ngrpo_merged`), an adapter is trained beside what its base
has taken in (`model.fuse`, whose digests are `fused` in its header), and no file should count twice.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ngrpo_lora.adapters.finding import HUB_FILE, find_adapter
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.adapters.report import header_value, mapping, numbers
from ngrpo_lora.config import ModelConfig
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.records.files import digest
from ngrpo_lora.world import ADAPTERS, MODELS

__all__ = [
    "contents",
    "counted_twice",
    "fused_digests",
    "located",
    "merged_before",
    "names_within",
    "settled",
    "strengths",
    "taken_in",
]

log = logging.getLogger(__name__)

Entries = Iterable[Any]  # of a header, which may hold anything


def _flat(entries: Entries, factor: float = 1.0) -> Iterator[tuple[str, str, float]]:
    """Digest, name and strength of each file that was merged, and of those that had been merged into these before."""
    for one in entries:
        if isinstance(one, dict) and isinstance(one.get("sha256"), str) and "weight" in numbers(one):
            yield one["sha256"], str(one.get("file")), factor * one["weight"]
            inside = one.get("merged")
            yield from _flat(inside if isinstance(inside, list) else [], factor * one["weight"])


def strengths(entries: Entries) -> dict[str, float]:
    """At which strength each file is in a sum, by digest; one that was taken out again, by its negative, is not.

    Args:
        entries: `ngrpo_merged` of a header.
    """
    found: dict[str, float] = {}
    for sha256, _, strength in _flat(entries):
        found[sha256] = found.get(sha256, 0.0) + strength
    return {sha256: strength for sha256, strength in found.items() if abs(strength) > 1e-9}


def names_within(entries: Entries) -> dict[str, str]:
    """What the files in a sum were called, by digest."""
    return {sha256: name for sha256, name, _ in _flat(entries)}


def contents(path: Path) -> dict[str, float]:
    """What a LoRA file holds at strength 1, by digest: first itself, then what was merged into it."""
    return {digest(path): 1.0} | strengths(header_value(read_metadata(path), "ngrpo_merged", []))


def merged_before(base: str) -> list[Any]:
    """What `ngrpo merge --base` has added to a model: `ngrpo_merged` of its weights; nothing of one on the Hub."""
    shards = sorted((MODELS.get(base, Path(base)) / "transformer").glob("*.safetensors"))
    try:
        with safe_open(shards[0], "pt") as file:
            return header_value(file.metadata() or {}, "ngrpo_merged", [])
    except (IndexError, SafetensorError, OSError):  # what is wrong with it is said where it is loaded
        return []


def taken_in(model: ModelConfig, inside: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, float]:
    """What a base has taken in, merged into its weights or by `model.fuse`, with strengths by digest.

    Args:
        inside: `contents` of the files of `model.fuse`, by their names there, where they are known.
    Raises:
        ConfigError: a file of `model.fuse` cannot be found.
    """
    found = strengths(merged_before(model.path))
    for name, strength in model.fuse.items():
        held = contents(find_adapter(name, "model.fuse")) if inside is None else inside[name]
        for sha256, own in held.items():
            found[sha256] = found.get(sha256, 0.0) + strength * own
    return found


def counted_twice(inside: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, str]]:
    """Pairs of names of which the second is, or was merged from, the file that the first one is.

    Args:
        inside: `contents` of the files of `model.fuse`, by their names there.
    """
    names, own = [*inside], {name: next(iter(held)) for name, held in inside.items()}
    for place, name in enumerate(names):
        for other in (other for other in names if other != name and own[name] in inside[other]):
            if own[other] != own[name] or names.index(other) > place:  # two names of one file are one pair
                yield name, other


def fused_digests(header: Mapping[str, str]) -> dict[str, str]:
    """Digests of the files that an adapter was trained beside, by their names in its `model.fuse`."""
    fused = mapping(header_value(header, "ngrpo", {}), "fused")
    return {name: sha256 for name, sha256 in fused.items() if isinstance(sha256, str)}


def settled(
    model: ModelConfig, fused: Mapping[str, str], beside: Collection[Path], trained_on: str | None = None
) -> ModelConfig:
    """A model to draw with: without files that its base holds already, and with those that were moved where they are.

    Args:
        fused: digests of the files of `model.fuse`, by their names there.
        beside: adapters, beside which a file may be that is not where it was.
        trained_on: the base that they were trained on; one that they are now put on may hold a file already.
    Raises:
        ConfigError: a file is nowhere to be found.
    """
    moved = trained_on is not None and _place(trained_on) != _place(model.path)
    held = strengths(merged_before(model.path)) if moved else {}
    fuse: dict[str, float] = {}
    for name, strength in model.fuse.items():
        if held and (fused.get(name) or _digest_here(name)) in held:
            continue
        path = located(name, fused.get(name), beside)
        fuse[path] = fuse.get(path, 0.0) + strength
    return model.model_copy(update={"fuse": fuse})


def _place(base: str) -> str:
    """A model's name, or its folder as it is from anywhere."""
    return str(MODELS.get(base, Path(base)).resolve()) if base in MODELS or Path(base).is_dir() else base


def _digest_here(name: str) -> str | None:
    """The digest of a file of `model.fuse` that is on this machine under its own name."""
    return digest(find_adapter(name, "model.fuse")) if Path(name).exists() or name in ADAPTERS else None


def located(name: str, sha256: str | None, beside: Collection[Path]) -> str:
    """The name of a file of `model.fuse`, or the path of the same file beside an adapter where it is gone from there.

    Args:
        sha256: the file's digest; None where it is not known, so that its name alone counts.
        beside: adapters; their folders, and those of their runs, are looked through.
    Raises:
        ConfigError: it is nowhere to be found.
    """
    if not Path(name).exists() and name not in ADAPTERS and re.fullmatch(HUB_FILE, Path(name).as_posix()):
        return name  # of the Hub
    try:
        find_adapter(name, "model.fuse")
        return name
    except ConfigError as error:
        files = (file for file in _files_beside(beside, Path(name).name) if sha256 and digest(file) == sha256)
        if (found := next(files, None)) is None:
            where = "back there, or beside the adapter" if sha256 else "back there"
            raise ConfigError(f"{error}; put {Path(name).name} {where}") from None
    log.warning("model.fuse (%s) is not there any more; %s, which is the same file, takes its place", name, found)
    return str(found.absolute())


def _files_beside(adapters: Collection[Path], name: str) -> Sequence[Path]:
    """LoRA files in the folders of adapters and of their runs; those of that name first, as a digest takes time."""
    folders = {adapter.parent for adapter in adapters}
    folders |= {folder.parent for folder in folders if folder.name == "adapter"}
    files = (file for folder in sorted(folders) for file in folder.glob("*.safetensors"))
    return sorted(files, key=lambda file: (file.name != name, file))


def close(strength: float, other: float) -> bool:
    """Whether two strengths are the same, but for the rounding of sums and products."""
    return math.isclose(strength, other, rel_tol=1e-6, abs_tol=1e-9)
