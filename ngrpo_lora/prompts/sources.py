"""Prompt sources: each prompt is a function of source, seed and index, whoever asks for it and when."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ngrpo_lora.config import PromptsConfig, RunConfig
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.files import BUILTIN_SOURCES, TASKS_OF, Prompt, PromptTable, read_prompts
from ngrpo_lora.prompts.pictures import SourcePicture
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.world.edits import EDIT_TASKS, EditTask, choose_source, split_edits
from ngrpo_lora.world.scenes import TASKS, TEMPLATES, Task, split_scenes

__all__ = [
    "BUILTIN_SOURCES",
    "EditPrompts",
    "Prompt",
    "PromptList",
    "PromptMix",
    "PromptSource",
    "Split",
    "WorldPrompts",
    "count_longer",
    "divide",
    "needed_prompts",
    "open_prompts",
    "open_run",
    "open_split",
    "read_split",
    "token_lengths",
    "training_prompts",
]

logger = logging.getLogger(__name__)

Sources = str | Mapping[str, int]

NUM_ALIKE = 1000  # prompts of a built-in source that stand for all others


class PromptSource(Protocol):
    """An endless, seeded sequence of prompts."""

    def prompt(self, index: int) -> Prompt:
        """The prompt at a position, the same at every call."""
        ...


class PromptList:
    """Prompts of a file or dataset, in a new random order every epoch."""

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        self.prompts, self.seed = prompts, seed

    def prompt(self, index: int) -> Prompt:
        """The prompt at a position; an epoch has every prompt once."""
        epoch, position = divmod(index, len(self.prompts))
        return self.prompts[_order(derive_seed(self.seed, "epoch", epoch), len(self.prompts))[position]]


@lru_cache(maxsize=8)  # of a few sources; all prompts of an epoch are asked for one by one
def _order(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


class WorldPrompts:
    """Random captions of the embedded world, whose tasks take turns."""

    def __init__(self, held_out: bool, seed: int, tasks: Sequence[Task] = TASKS):
        self.seed, self.tasks = seed, tasks
        self.scenes = {task: split_scenes(task)[held_out] for task in tasks}

    def prompt(self, index: int) -> Prompt:
        """A random scene of task `tasks[index mod len(tasks)]` in a random template."""
        rng = np.random.default_rng(derive_seed(self.seed, "prompt", index))
        pool = self.scenes[self.tasks[index % len(self.tasks)]]
        return Prompt(TEMPLATES[rng.integers(len(TEMPLATES))].format(pool[rng.integers(len(pool))].caption))


class EditPrompts:
    """Random edits of rendered pictures of the embedded world, whose tasks take turns."""

    def __init__(self, held_out: bool, seed: int, tasks: Sequence[EditTask] = EDIT_TASKS):
        self.seed, self.tasks = seed, tasks
        self.edits = {task: split_edits(task)[held_out] for task in tasks}

    def prompt(self, index: int) -> Prompt:
        """A random edit of task `tasks[index mod len(tasks)]` with a random source."""
        rng = np.random.default_rng(derive_seed(self.seed, "prompt", index))
        pool = self.edits[self.tasks[index % len(self.tasks)]]
        edit = pool[rng.integers(len(pool))]
        png = io.BytesIO()
        Image.fromarray(choose_source(edit, rng).render()).save(png, "PNG")
        name = f"source-{index}.png"
        return Prompt(edit.instruction, {"source": name}, SourcePicture(png.getvalue(), name, f"prompt {index}"))


class PromptMix:
    """Several sources mixed: of every `sum(weights)` prompts, each gives its weight's number, evenly spread."""

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


def open_prompts(source: Sources, seed: int, tables: Mapping[str, PromptTable] | None = None) -> PromptSource:
    """The prompts of a built-in source (`world:train`, `edits:held_out/recolor`), of a file or dataset, or of several.

    Args:
        source: one name, or the weight of each.
        tables: files and datasets that were read already; without it they are read here, without duplicates.
    Raises:
        ConfigError: as `read_prompts`.
    """
    if not isinstance(source, str):
        parts = [open_prompts(name, derive_seed(seed, name), tables) for name in source]
        return PromptMix(parts, list(source.values()))
    if source in BUILTIN_SOURCES:
        split, _, task = source.partition("/")
        kind = EditPrompts if split.startswith("edits:") else WorldPrompts
        return kind(split.endswith(":held_out"), seed, [t for t in TASKS_OF[split] if not task or t == task])
    table = read_prompts(source) if tables is None else tables[source]
    return PromptList(table.prompts, seed)


def divide(prompts: Iterable[Prompt], fraction: float) -> tuple[list[Prompt], list[Prompt]]:
    """Divide prompts into a training and a held-out part by the SHA-256 of `Prompt.asked`: equal ones stay together.

    Neither order, file nor seed matters, and a larger fraction holds out what a smaller one does, and more.

    Args:
        fraction: expected share of the held-out part, in (0, 1).
    Raises:
        ConfigError: one of the parts is empty.
    """
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in prompts:
        parts[derive_seed("held_out", prompt.asked) < fraction * 2**63].append(prompt)
    if not all(parts):
        train, held_out = map(len, parts)
        raise ConfigError(
            f"must leave prompts on both sides, but of {train + held_out} it holds out {held_out}; "
            "set another fraction, or a source of its own"
        )
    return parts


class Split(NamedTuple):
    """Tables of prompts by source, for training and for evaluation; the built-in sources have none."""

    train: dict[str, PromptTable]
    held_out: dict[str, PromptTable]


def read_split(config: PromptsConfig) -> Split:
    """Read all files and datasets of a configuration; a `held_out` that is a number divides those of `train`.

    Raises:
        ConfigError: one line per faulty source, beginning with its key.
    """
    problems: list[str] = []
    tables = _read("train", config.train, config.deduplicate, problems)
    if isinstance(config.held_out, str | dict):
        split = Split(tables, _read("held_out", config.held_out, config.deduplicate, problems))
    else:
        split, key = Split({}, {}), f"prompts.held_out={config.held_out:g}"
        for name in _names(config.train):
            if name in BUILTIN_SOURCES:
                rule = f"{key} must divide files or datasets, but {name} is neither"
                problems.append(f"{rule}; set it to a source such as world:held_out")
            elif name in tables:
                try:
                    train, held_out = divide(tables[name].prompts, config.held_out)
                except ConfigError as error:
                    problems.append(f"{key} of {name!r} {error}")
                else:
                    split.train[name] = replace(tables[name], prompts=train)
                    split.held_out[name] = PromptTable(held_out)
    if problems:
        raise ConfigError(problems)
    return split


def _names(sources: Sources) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources)


def _read(key: str, sources: Sources, deduplicate: bool, problems: list[str]) -> dict[str, PromptTable]:
    """The tables of a key's files and datasets; what is wrong with the others is added to `problems`."""
    tables: dict[str, PromptTable] = {}
    for name in _names(sources):
        if name not in BUILTIN_SOURCES:
            try:
                tables[name] = read_prompts(name, deduplicate)
            except ConfigError as error:
                problems.append(f"prompts.{key} {error}")
    return tables


def open_split(
    config: PromptsConfig, train_seed: int, held_out_seed: int, split: Split | None = None
) -> tuple[PromptSource, PromptSource]:
    """The training and the held-out prompts of a run.

    Args:
        split: what was read already; without it the files are read here, and it is logged what was dropped, and what
            is in both.
    Raises:
        ConfigError: as `read_split`.
    """
    if split is None:
        _log_repeated(split := read_split(config))
    held_out = config.held_out if isinstance(config.held_out, str | dict) else config.train
    return open_prompts(config.train, train_seed, split.train), open_prompts(held_out, held_out_seed, split.held_out)


def _log_repeated(split: Split) -> None:
    for key, tables in split._asdict().items():
        for name, table in tables.items():
            if table.num_duplicates:
                logger.info("prompts.%s: %d duplicates of %s dropped", key, table.num_duplicates, name)
    seen, kept_apart = ({prompt.asked for table in tables.values() for prompt in table.prompts} for tables in split)
    if common := seen & kept_apart:
        logger.warning(
            "%d of %d prompts of prompts.held_out are in prompts.train too: held-out figures tell less than they seem; "
            "drop them from one, or give held_out a fraction such as 0.05",
            len(common),
            len(kept_apart),
        )


def open_run(config: RunConfig, split: Split | None = None) -> tuple[PromptSource, list[Prompt]]:
    """Where the training prompts of a run come from, and the held-out ones of every evaluation; as `open_split`."""
    prompts, held_out = open_split(config.prompts, derive_seed(config.seed, "prompts"), config.evaluation.seed, split)
    return prompts, [held_out.prompt(i) for i in range(config.evaluation.num_prompts)]


def training_prompts(config: RunConfig) -> range:
    """The positions of all prompts that a run trains on."""
    return range(config.trainer.num_iterations * config.rollout.prompts_per_iteration)


def needed_prompts(config: RunConfig, split: Split) -> dict[str, list[Prompt]]:
    """The different prompts that a run takes from `prompts.train` and `prompts.held_out`, in the order of their files.

    Where all training prompts are made by the package, the first `NUM_ALIKE` stand for the others.
    """
    prompts, held_out = open_run(config, split)
    positions = training_prompts(config) if split.train else training_prompts(config)[:NUM_ALIKE]
    return {
        "prompts.train": _in_order(split.train, map(prompts.prompt, positions)),
        "prompts.held_out": _in_order(split.held_out, held_out),
    }


def _in_order(tables: Mapping[str, PromptTable], taken: Iterable[Prompt]) -> list[Prompt]:
    """Different prompts as their tables have them; those of no table come last."""
    wanted = {(one.key, one.mask): one for one in taken}
    listed = {(one.key, one.mask): one for table in tables.values() for one in table.prompts}
    return [*({key: one for key, one in listed.items() if key in wanted} | wanted).values()]


def token_lengths(texts: Sequence[str], tokenizer: Callable[..., Any]) -> list[int]:
    """Number of tokens of each text, special ones included, with nothing cut off."""
    return [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]


def count_longer(texts: Sequence[str], tokenizer: Callable[..., Any], limit: int) -> int:
    """How many texts have more than `limit` tokens, special ones included: a model reads only their beginnings."""
    return sum(length > limit for length in token_lengths(texts, tokenizer))


def listed_prompts(source: str, count: int) -> list[Prompt]:
    """The first prompts of a source, in the order of its file.

    Raises:
        ConfigError: no such source.
    """
    try:
        if source in BUILTIN_SOURCES:
            endless = open_prompts(source, 0)
            return [endless.prompt(index) for index in range(count)]
        return read_prompts(source).prompts[:count]
    except ConfigError as error:
        raise ConfigError(f"--prompts {error}") from None
