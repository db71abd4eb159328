"""Checks the source pictures of prompts against a model, without loading it: whoever draws from them checks them so."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.pictures import SourcePicture, sole_column

__all__ = ["check_sources", "warn_of_cropping"]

log = logging.getLogger(__name__)

Size = tuple[int, int]

READERS = 8  # threads; a large picture takes some hundred megabytes while it is read
WHITE = 250  # of 255, and more: what a JPEG file makes of it
MIN_KEPT = 0.5  # share of a source that should be left of it


def check_sources(
    key: str, prompts: Iterable[Prompt], edits: bool, model: str, otherwise: str = "", keeper: str = ""
) -> dict[SourcePicture, Size]:
    """Check that each prompt of a model that edits has a picture that can be read, and that no other has one.

    Args:
        key: of the configuration, such as `prompts.train`.
        edits: whether the model edits pictures.
        model: its name, for messages.
        otherwise: how else than in a column a source is given, for messages.
        keeper: a reward that has no score where a mask lets all of a picture change; empty where there is none.
    Returns:
        The different sources, each with its (width, height) in pixels.
    Raises:
        ConfigError: one message, of the first that is wrong.
    """
    prompts = [*prompts]
    if not edits:
        _check_absent(key, prompts, model)
        return {}
    _check_present(key, prompts, model, otherwise)
    pairs = [*dict.fromkeys((prompt.source, prompt.mask) for prompt in prompts if prompt.source is not None)]
    try:
        with ThreadPoolExecutor(READERS) as readers:
            sizes = [*readers.map(lambda pair: _check_pair(pair[0], pair[1], keeper), pairs)]
    except ConfigError as error:
        raise ConfigError(f"{key} {error}") from None
    return {source: size for (source, _), size in zip(pairs, sizes, strict=True)}


def warn_of_cropping(key: str, sources: Mapping[SourcePicture, Size], drawn: Size) -> None:
    """Say how many sources lose most of their area where they are cropped to the shape of what is drawn.

    Args:
        key: as of `check_sources`.
        sources: as it returns them.
        drawn: (width, height) of pictures in pixels.
    """
    width, height = drawn
    cut = {one: size for one, size in sources.items() if _kept(size, drawn) < MIN_KEPT}
    for first, size in [*cut.items()][:1]:
        log.warning(
            f"{key}: of {len(cut):,} of {len(sources):,} source pictures less than half is left, as they are cropped "
            f"to the shape of {width} x {height} px, first {first.name!r} ({first.place}) of {size[0]} x {size[1]} px, "
            f"of which {_kept(size, drawn):.0%} is left; crop them as you wish, or set width and height to their shape"
        )


def _kept(size: Size, drawn: Size) -> float:
    """The share of a picture that is left where it is scaled to cover another shape, and the middle cut out."""
    ratio = size[0] * drawn[1] / (size[1] * drawn[0])
    return min(ratio, 1 / ratio)


def _check_absent(key: str, prompts: Sequence[Prompt], model: str) -> None:
    for prompt in prompts:
        if (source := prompt.source) is not None:
            is_option, in_table = source.place.startswith("--"), bool(prompt.place)
            remedy = f"leave out {source.place}, or " if is_option else "rename the column source, or " * in_table
            raise ConfigError(
                f"{key} must have no source pictures for {model!r}, which edits none, but {source.place} has "
                f"{source.name!r}; {remedy}give a model that edits, such as embedded-edit, FLUX.1-Kontext, or FLUX.2 "
                "with model.edits=true"
            )


def _check_present(key: str, prompts: Sequence[Prompt], model: str, otherwise: str) -> None:
    if lacking := [prompt for prompt in prompts if prompt.source is None]:
        count = f"{len(lacking):,} of {len(prompts):,} {'has' if len(lacking) == 1 else 'have'} none"
        cell = _cell(lacking[0], "source") or ""
        raise ConfigError(
            f"{key} must have a source picture with every prompt for {model!r}, which starts from one, but {count}, "
            f"first {lacking[0].told}{f', whose source {cell!r:.120} is no picture' if str(cell).strip() else ''}; "
            f"{_remedy(lacking[0].place)}{otherwise}"
        )
    for prompt in prompts:
        if prompt.mask is None and (cell := _cell(prompt, "mask")) not in (None, ""):
            raise ConfigError(
                f"{key} must have pictures in the column mask, but {prompt.told} has {cell!r:.120}; name files, or "
                "leave it out"
            )


def _remedy(place: str) -> str:
    """How the row of a table or a dataset is given its source."""
    if (found := re.search(r" of 'hf:([^'?#]*)([^'#]*)", place)) is None:
        return "name the files in a column source, as in a .csv or .jsonl file"
    if "source=" in found[2]:
        return "give every row a picture in the column that ?source= names"
    options = f"{found[2]}&" if found[2] else "?"
    return f"name the dataset's column of pictures, as in hf:{found[1]}{options}source=image"


def _cell(prompt: Prompt, column: str) -> object:
    """What the row of a prompt says in a column of pictures."""
    name = sole_column(prompt.metadata, column, prompt.place)
    return None if name is None else prompt.metadata[name]


def _check_pair(source: SourcePicture, mask: SourcePicture | None, keeper: str) -> Size:
    """The size of a source that can be read, as its mask is, which is of the same size; else raises ConfigError."""
    size = source.load().size
    if mask is None:
        return size
    loaded = mask.load()
    if (found := loaded.size) != size:
        shown = f"is a mask of {found[0]} x {found[1]} px for a source of {size[0]} x {size[1]} px"
        raise mask.refused(f"{shown}; make it as large")
    if keeper and not any(loaded.convert("L").histogram()[:WHITE]):
        raise mask.refused(
            f"is a mask that is white all over, which leaves {keeper} nothing to compare; make it black where the "
            "source is to stay, or leave it out"
        )
    return size
