"""What can be found wrong with the LoRA files that a run starts from, before its model loads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ngrpo_lora.config import RunConfig
from ngrpo_lora.errors import UserError

if TYPE_CHECKING:
    from ngrpo_lora.adapters.reading import AdapterFile

__all__ = ["fused", "initial", "known_pipeline_of", "with_files_of"]


def initial(config: RunConfig) -> Iterator[str]:
    """Whether the adapter to start from can be read, and has room in the new one; a resumed run does not need it."""
    if config.lora.init_from is None or config.resume is not None:
        return

    from ngrpo_lora.adapters.bases import warn_of_use
    from ngrpo_lora.adapters.contents import taken_in
    from ngrpo_lora.adapters.reading import read_adapter_file

    try:
        file = read_adapter_file(config.lora.init_from, family := known_family(config))
    except UserError as error:
        yield f"lora.init_from: {error}"
        return
    if is_foreign(file, family):
        yield (
            f"lora.init_from must be a LoRA file of {config.model.path!r}, but {str(config.lora.init_from)!r} is of "
            f"{file.fits}"
        )
    rank, room = max(layer.rank for layer in file.layers.values()), config.lora.rank
    if rank > room:
        yield f"lora.rank must be at least {rank}, that of lora.init_from {config.lora.init_from!r}, got {room}"
    with contextlib.suppress(UserError):  # of model.fuse, which `fused` says
        model = config.model
        warn_of_use([file], model.path, model.fuse, taken_in(model), "give it in model.fuse too")


def fused(config: RunConfig) -> Iterator[str]:
    """Whether the LoRA files that the base takes in are there, are of its family, and would count once."""
    if not config.model.fuse:
        return

    from ngrpo_lora.adapters.contents import contents
    from ngrpo_lora.adapters.finding import find_adapter
    from ngrpo_lora.adapters.reading import check_fusible, read_adapter_file

    family, inside = known_family(config), dict[str, dict[str, float]]()
    for path in config.model.fuse:
        try:
            check_fusible(file := read_adapter_file(find_adapter(path, "model.fuse"), family))
        except UserError as error:
            gone = "; put it there, or give the path that it has now" if str(error).endswith("does not exist") else ""
            yield (str(error) if "model.fuse" in str(error) else f"model.fuse: {error}") + gone
            continue
        inside[path] = contents(file.path)
        if is_foreign(file, family):
            yield f"model.fuse must be LoRA files of {config.model.path!r}, but {path!r} is of {file.fits}"
    if config.resume is None:  # a run that has begun so goes on so
        yield from _doubled(config.model.path, inside)


def _doubled(base: str, inside: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Which files of `model.fuse` would count twice: given under two names, or in the base's weights already.

    Args:
        inside: what the files hold, by their names.
    """
    from ngrpo_lora.adapters.contents import counted_twice, merged_before, names_within, strengths

    for name, other in counted_twice(inside):
        what = "is the same file" if next(iter(inside[name])) == next(iter(inside[other])) else "was merged from it"
        yield (
            f"model.fuse must name each file once, got {name!r} and {other!r}, which {what}; give one of them, with "
            "the sum of the strengths"
        )
    before = merged_before(base)
    held, called = strengths(before), names_within(before)
    for name, digests in inside.items():
        if found := next((sha256 for sha256 in digests if sha256 in held), None):
            remedy = "drop model.fuse" if len(inside) == 1 else f"drop {name!r} from model.fuse"
            yield (
                f"model.fuse must not hold what the base has in its weights, but {base!r} was merged with "
                f"{called[found]!r} at {held[found]:g} already, and {name!r} would count twice; {remedy}"
            )


def is_foreign(file: AdapterFile, family: str | None) -> bool:
    """Whether a LoRA file is known to be of other families than the model's, which may not be known."""
    return family is not None and bool(file.families) and family not in file.families


def known_family(config: RunConfig) -> str | None:
    """The model's family; None where it cannot be told, which another check says."""
    from ngrpo_lora.models._index import family_of_pipeline

    pipeline = known_pipeline_of(config)
    try:
        return None if pipeline is None else family_of_pipeline(config.model, pipeline)
    except UserError:
        return None


def known_pipeline_of(config: RunConfig) -> str | None:
    """The pipeline that the model is made for, of models that the package knows without looking; None: not known."""
    from ngrpo_lora.models._index import known_pipeline

    try:
        return known_pipeline(config.model)
    except UserError:
        return None


def with_files_of(old: RunConfig, new: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration of a run with the new one's `model.fuse`, if its files are the same under other names.

    Args:
        run_dir: the run's folder, which holds the digests of the files that it began with.
    """
    if old.model.fuse == new.model.fuse:
        return old

    from ngrpo_lora.adapters.finding import find_adapter
    from ngrpo_lora.records.files import digest
    from ngrpo_lora.training.inputs import FILE
    from ngrpo_lora.world import ADAPTERS

    try:
        before = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        known = [before.get(f"model.fuse ({name})") for name in old.model.fuse]
        own = [find_adapter(name) if name in ADAPTERS else None for name in old.model.fuse]
        begun = [one or (file and digest(file)) for one, file in zip(known, own, strict=True)]
        here = [digest(find_adapter(name)) for name in new.model.fuse]
    except (OSError, ValueError, AttributeError, UserError):  # that they are the same is not known
        return old
    if [*zip(begun, old.model.fuse.values(), strict=True)] != [*zip(here, new.model.fuse.values(), strict=True)]:
        return old
    return old.model_copy(update={"model": old.model.model_copy(update={"fuse": new.model.fuse})})
