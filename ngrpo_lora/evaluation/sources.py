"""What pictures were edited from, for rewards that judge edits: as metadata.jsonl says, or their own PNG text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.console import console
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.prompts.pictures import SourcePicture, recorded_source, take_pictures
from ngrpo_lora.records.pictures import Picture

__all__ = ["with_sources"]

TOLD = 3  # pictures that a message names


def with_sources(pictures: Sequence[Picture], configs: Sequence[RewardConfig]) -> list[Picture]:
    """The pictures that are to be scored; of each that `ngrpo sample` has edited, the metadata name the source.

    What metadata.jsonl says goes before the PNG text. A picture that another one in its folder has as its source or
    mask is not scored, unless it has a source of its own.

    Raises:
        UserError: a reward needs sources, and one is not named, or it or its mask is gone, has changed or is broken.
    """
    found: list[Picture] = []
    lost: dict[str, UserError] = {}
    for picture in pictures:
        try:
            found.append(completed(picture))
        except UserError as error:
            found.append(picture)
            lost[picture.name] = error
    kept = without_sources(found)
    judge = next((config.key for config in configs if config.judges_edits), None)
    if judge is not None:
        check_sources(judge, kept, lost)
    return kept


def completed(picture: Picture) -> Picture:
    """A picture with the source of its PNG text, where its metadata name none.

    Raises:
        UserError: that source is gone or has changed.
    """
    if "source" in named_by(picture):
        return picture
    source = recorded_source(picture.path, remedy(picture.path))
    return picture if source is None else replace(picture, metadata=picture.metadata | {"source": str(source.content)})


def named_by(picture: Picture) -> dict[str, SourcePicture]:
    """The source and mask that a picture's metadata name, whether their files are there or not.

    Raises:
        ConfigError: they name two sources or two masks.
    """
    try:
        return take_pictures(dict(picture.metadata), picture.path.parent, picture.place)
    except ConfigError as error:
        raise ConfigError(f"SOURCE {error}") from None


def without_sources(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures without those that others in their folder are edits of, which are told."""
    named = [named_by(picture) for picture in pictures]
    used: set[str] = set()
    for picture, own in zip(pictures, named, strict=True):
        files = {os.path.abspath(one.content) for one in own.values() if isinstance(one.content, Path)}
        used |= {file for file in files if os.path.dirname(file) == os.path.dirname(os.path.abspath(picture.path))}
    kept: list[Picture] = []
    left: dict[str, None] = {}
    for picture, own in zip(pictures, named, strict=True):
        if "source" in own or os.path.abspath(picture.path) not in used:
            kept.append(picture)
        else:
            left[repr(str(picture.path))] = None
    if left:
        more = f" and {len(left) - TOLD} more" if len(left) > TOLD else ""
        told = ", ".join([*left][:TOLD])
        console.print(f"not scored, since others in the folder are edits of them: {told}{more}")
    return kept


def check_sources(judge: str, pictures: Sequence[Picture], lost: Mapping[str, UserError]) -> None:
    """Check that each picture has a source that can be read, and a mask where it names one.

    Args:
        judge: name of the reward that needs them.
        lost: errors by the name of the picture, of sources that are written down in it.
    Raises:
        UserError: the first that is wrong.
    """
    named = [named_by(picture) for picture in pictures]
    for file in dict.fromkeys(file for own in named for file in own.values()):
        try:
            file.load()
        except ConfigError as error:
            raise ConfigError(f"--reward {judge} {error}") from None
    for picture, own in zip(pictures, named, strict=True):
        if picture.name in lost:
            raise lost[picture.name]
        if "source" not in own:
            value = picture.metadata.get("source")
            raise ConfigError(
                f"--reward {judge} needs the source of every picture, but {str(picture.path)!r} has "
                f"{'none' if value is None else f'{value!r:.120}'}; {remedy(picture.path)}, or leave the picture out"
            )


def remedy(path: Path) -> str:
    """How a picture's source is given."""
    line = f'{{"file_name": "{path.name}", "source": "before/{path.name}"}}'
    return f"name its file in metadata.jsonl beside the picture, in a line such as {line}"
