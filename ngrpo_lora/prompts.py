"""Prompt sources: `(source, seed, index) -> prompt`, so that a run's prompts do not depend on who asks when."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.noise import derive_seed
from ngrpo_lora.world.scenes import TASKS, TEMPLATES, split_scenes

__all__ = ["BUILTIN_SOURCES", "PromptFile", "PromptSource", "WorldPrompts", "open_prompts", "read_prompt_file"]

BUILTIN_SOURCES = ("world:train", "world:held_out")


def read_prompt_file(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines and a byte order mark are skipped.

    Raises:
        ConfigError: no such file, not readable, not UTF-8, or no prompt in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        builtin = " or ".join(BUILTIN_SOURCES)
        raise ConfigError(f"must be {builtin} or a text file, but there is no file {str(path)!r}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"must be a UTF-8 text file, but byte {error.start} of {str(path)!r} is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"must be a readable text file, but {str(path)!r} is not: {error.strerror}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"must hold at least one prompt, but {str(path)!r} is empty; write one prompt a line")
    return prompts


class PromptSource(Protocol):
    """An endless, seeded sequence of prompts."""

    def prompt(self, index: int) -> str:
        """The prompt at a position, the same at every call."""
        ...


class PromptFile:
    """The lines of a file, in a new order every time round."""

    def __init__(self, prompts: list[str], seed: int):
        self.prompts, self.seed = prompts, seed

    def prompt(self, index: int) -> str:
        """Every prompt once per epoch."""
        epoch, position = divmod(index, len(self.prompts))
        order = np.random.default_rng(derive_seed(self.seed, "epoch", epoch)).permutation(len(self.prompts))
        return self.prompts[order[position]]


class WorldPrompts:
    """Captions of the embedded world, its six tasks in turn."""

    def __init__(self, held_out: bool, seed: int):
        self.seed = seed
        self.scenes = {task: split_scenes(task)[held_out] for task in TASKS}

    def prompt(self, index: int) -> str:
        """A random scene of task `index mod 6` in a random template."""
        rng = np.random.default_rng(derive_seed(self.seed, "prompt", index))
        pool = self.scenes[TASKS[index % len(TASKS)]]
        return TEMPLATES[rng.integers(len(TEMPLATES))].format(pool[rng.integers(len(pool))].caption)


def open_prompts(source: str, seed: int) -> PromptSource:
    """The prompts of `world:train`, `world:held_out` or a text file.

    Raises:
        ConfigError: as `read_prompt_file`.
    """
    if source in BUILTIN_SOURCES:
        return WorldPrompts(source == "world:held_out", seed)
    return PromptFile(read_prompt_file(source), seed)
