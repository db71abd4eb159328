"""Prompt sources: `(source, seed, index) -> prompt`, so that a run's prompts do not depend on who asks when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.noise import derive_seed
from ngrpo_lora.world.scenes import TASKS, TEMPLATES, Task, split_scenes

__all__ = [
    "BUILTIN_SOURCES",
    "Prompt",
    "PromptFile",
    "PromptMix",
    "PromptSource",
    "WorldPrompts",
    "open_prompts",
    "read_prompt_file",
]

SPLITS = ("world:train", "world:held_out")
BUILTIN_SOURCES = (*SPLITS, *(f"{split}/{task}" for split in SPLITS for task in TASKS))


def read_prompt_file(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines and a byte order mark are skipped.

    Raises:
        ConfigError: no such file, not readable, not UTF-8, or no prompt in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        builtin = f"{', '.join(SPLITS)}, one task of them ({SPLITS[0]}/{TASKS[0]})"
        raise ConfigError(f"must be {builtin} or a text file, but there is no file {str(path)!r}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"must be a UTF-8 text file, but byte {error.start} of {str(path)!r} is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"must be a readable text file, but {str(path)!r} is not: {error.strerror}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"must hold at least one prompt, but {str(path)!r} is empty; write one prompt a line")
    return prompts


class Prompt(NamedTuple):
    """What to draw, and what rewards are told beside it."""

    text: str
    metadata: dict[str, Any] = {}


class PromptSource(Protocol):
    """An endless, seeded sequence of prompts."""

    def prompt(self, index: int) -> Prompt:
        """The prompt at a position, the same at every call."""
        ...


class PromptFile:
    """The lines of a file, in a new order every time round."""

    def __init__(self, prompts: list[str], seed: int):
        self.prompts, self.seed = prompts, seed

    def prompt(self, index: int) -> Prompt:
        """Every prompt once per epoch."""
        epoch, position = divmod(index, len(self.prompts))
        order = np.random.default_rng(derive_seed(self.seed, "epoch", epoch)).permutation(len(self.prompts))
        return Prompt(self.prompts[order[position]])


class WorldPrompts:
    """Captions of the embedded world, its tasks in turn."""

    def __init__(self, held_out: bool, seed: int, tasks: Sequence[Task] = TASKS):
        self.seed, self.tasks = seed, tasks
        self.scenes = {task: split_scenes(task)[held_out] for task in tasks}

    def prompt(self, index: int) -> Prompt:
        """A random scene of task `tasks[index mod len(tasks)]` in a random template."""
        rng = np.random.default_rng(derive_seed(self.seed, "prompt", index))
        pool = self.scenes[self.tasks[index % len(self.tasks)]]
        return Prompt(TEMPLATES[rng.integers(len(TEMPLATES))].format(pool[rng.integers(len(pool))].caption))


class PromptMix:
    """Several sources: of every `sum(weights)` prompts, each source gives its weight's number, evenly spread."""

    def __init__(self, sources: Sequence[PromptSource], weights: Sequence[int]):
        self.sources, self.weights = sources, weights
        # Each source's prompts lie in the middles of equal parts of the cycle.
        places = [((turn + 0.5) / weight, s, turn) for s, weight in enumerate(weights) for turn in range(weight)]
        self.cycle = [(s, turn) for _, s, turn in sorted(places)]

    def prompt(self, index: int) -> Prompt:
        """The next prompt of the source whose turn it is."""
        epoch, position = divmod(index, len(self.cycle))
        source, turn = self.cycle[position]
        return self.sources[source].prompt(epoch * self.weights[source] + turn)


def open_prompts(source: str | Mapping[str, int], seed: int) -> PromptSource:
    """The prompts of a built-in source (`world:train`, `world:held_out/color`), of a text file, or of several.

    Args:
        source: one name, or the weight of each.
    Raises:
        ConfigError: as `read_prompt_file`.
    """
    if not isinstance(source, str):
        return PromptMix([open_prompts(name, derive_seed(seed, name)) for name in source], list(source.values()))
    if source in BUILTIN_SOURCES:
        split, _, task = source.partition("/")
        return WorldPrompts(split == "world:held_out", seed, [t for t in TASKS if not task or t == task])
    return PromptFile(read_prompt_file(source), seed)
