"""Paths as people write them: `~` is the home folder, `$NAME` and `${NAME}` are variables of the environment."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated

from pydantic import AfterValidator

from ngrpo_lora import registry
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.world import MODELS

__all__ = [
    "AdapterText",
    "FolderText",
    "PathText",
    "SourceText",
    "expanded",
    "expanded_source",
    "finite_strength",
    "parse_weighted",
]

VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}]*)\})", re.ASCII)
MAX_NAME_BYTES = 255


def expanded(path: str) -> str:
    """The path with `~`, `~user`, `$NAME` and `${NAME}` replaced.

    Where names come from strangers, as in ComfyUI, nothing is: no graph may read the environment.

    Raises:
        ValueError: a variable that is not set or empty, an unknown user, or a name that no file can have.
    """
    if not registry.allow_modules:
        return path

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise ValueError(
                f"must not name a variable that is not set, got {path!r}; set {name}, or write out what it stands for"
            )
        return os.environ[name]

    # The home folder is itself no text to look for variables in, nor is what they stand for.
    home = re.match(r"~[^/\\]*", path)
    start, rest = (home[0], path[home.end() :]) if home else ("", path)
    found = os.path.expanduser(start)
    if home and found == start:
        raise ValueError(f"must not name the home of an unknown user, got {path!r}; a folder here is ./{path}")
    result = found + VARIABLE.sub(value, rest)
    if any(len(name.encode(errors="replace")) > MAX_NAME_BYTES for name in re.split(r"[/\\]", result)):
        raise ValueError(
            f"must be a path whose names have at most {MAX_NAME_BYTES} bytes, got {path[:40]!r}...; shorten it"
        )
    return result


def expanded_source(source: str) -> str:
    """A source of prompts with its file's or folder's path `expanded`; `hf:` before and `#column` after it stay.

    Raises:
        ValueError: as `expanded`.
    """
    kind, path, column = re.fullmatch(r"(hf:)?([^#?]*)(.*)", source, re.DOTALL).groups("")  # type: ignore[union-attr]
    return f"{kind}{expanded(path)}{column}"


def parse_weighted(text: str, default: float = 1.0) -> tuple[str, float]:
    """`FILE:0.5` -> the path and its weight, or `default` where none is given.

    Raises:
        ConfigError: a weight that is not finite.
    """
    path, _, number = text.rpartition(":")
    try:
        path, weight = (path, float(number)) if path else (text, default)
    except ValueError:  # the colon is part of the path
        path, weight = text, default
    return path, finite_strength(path, weight)


def finite_strength(path: str, strength: float) -> float:
    """Return `strength`, which must be finite; `path` names the adapter in the message.

    Raises:
        ConfigError: it is not finite.
    """
    if not math.isfinite(strength):
        raise ConfigError(f"the strength of an adapter must be finite, got {strength} for {path!r}")
    return strength


def from_anywhere(path: str) -> str:
    """The path of a folder that is there as it is from any other folder; all else, such as a Hub id, as it is."""
    return absolute(path) if path not in MODELS and os.path.isdir(path) else path


def file_from_anywhere(path: str) -> str:
    """The same of a file or a folder."""
    return absolute(path) if os.path.exists(path) else path


def absolute(path: str) -> str:
    """The path as it is from any other folder; where names come from strangers, as it is given."""
    return os.path.abspath(path) if registry.allow_modules else path


FolderText = Annotated[str, AfterValidator(expanded), AfterValidator(from_anywhere)]
"""A folder, or a name of something else: written down absolute, so that `owner/name` is one of the Hub's alone."""

PathText = Annotated[str, AfterValidator(expanded)]
SourceText = Annotated[str, AfterValidator(expanded_source)]
AdapterText = Annotated[str, AfterValidator(expanded), AfterValidator(file_from_anywhere)]
"""A LoRA file, its folder or a name of the Hub, written down as `FolderText` is."""
