"""Edits of the embedded world's pictures: an instruction such as `make the star blue`, a source and its targets.

An `Edit` is what an instruction asks for; `choose_source` sets up a picture that it can be asked of, `apply` makes the
change, and `render` draws both. What an instruction leaves open, the source and the place of what is added, comes from
the `numpy.random.Generator` in hand, so a seed is a pair of pictures.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ngrpo_lora.world.scenes import (
    COLORS,
    SHAPES,
    SIZE_PX,
    Object,
    Placed,
    Scene,
    choose_backdrop,
    choose_fill,
    paint,
    place,
    split_by_meaning,
)

EditTask = Literal["recolor", "replace", "remove", "add"]

EDIT_TASKS: tuple[EditTask, ...] = ("recolor", "replace", "remove", "add")


@dataclass(frozen=True)
class Edit:
    """What an instruction asks for: `noun` gets the colour or the shape `to`, goes, or comes."""

    task: EditTask
    noun: Object
    to: str | None = None

    @property
    def instruction(self) -> str:
        """The edit in words."""
        the = f"the {self.noun.color} {self.noun.shape}" if self.noun.color else f"the {self.noun.shape}"
        match self.task:
            case "recolor":
                return f"make {the} {self.to}"
            case "replace":
                return f"turn {the} into {Object(str(self.to))}"
            case "remove":
                return f"remove {the}"
            case "add":
                return f"add {self.noun}"

    @property
    def meaning(self) -> str:
        """One string for all instructions that ask for the same, whatever the colour that tells which object it is."""
        told = self.noun if self.task == "add" else Object(self.noun.shape)
        return Edit(self.task, told, self.to).instruction


def all_edits(task: EditTask) -> list[Edit]:
    """Every edit of one task, in a fixed order."""
    nouns = [Object(shape, color) for shape in SHAPES for color in (None, *COLORS)]
    match task:
        case "recolor":
            return [Edit(task, noun, color) for noun in nouns for color in COLORS if color != noun.color]
        case "replace":
            return [Edit(task, noun, shape) for noun in nouns for shape in SHAPES if shape != noun.shape]
        case "remove" | "add":
            return [Edit(task, noun) for noun in nouns]


def split_edits(task: EditTask, held_out_share: float = 0.2) -> tuple[list[Edit], list[Edit]]:
    """(train, held-out) edits of a task, as `scenes.split_by_meaning` divides them."""
    return split_by_meaning(all_edits(task), held_out_share)


def parse_edit(prompt: str) -> Edit:
    """The edit that a prompt asks for; case and surrounding white space do not matter.

    Raises:
        ValueError: the prompt is not one of the world's instructions.
    """
    try:
        return _edits_by_prompt()[prompt.strip().lower()]
    except KeyError:
        raise ValueError(
            f"a prompt must be an instruction of the world, such as 'make the star blue', got {prompt!r}; "
            "take one from all_edits"
        ) from None


@functools.cache
def _edits_by_prompt() -> dict[str, Edit]:
    return {edit.instruction: edit for task in EDIT_TASKS for edit in all_edits(task)}


@dataclass(frozen=True)
class Picture:
    """What `paint` draws: a background, and objects with their fills."""

    tint: np.ndarray
    shade: float
    placed: tuple[Placed, ...]
    fills: tuple[list[float], ...]

    def render(self) -> np.ndarray:
        """(64, 64, 3) uint8."""
        return paint(self.tint, self.shade, self.placed, self.fills)


def choose_source(edit: Edit, rng: np.random.Generator) -> Picture:
    """A picture that an edit can be asked of: up to three objects of different shapes, of which one is the noun.

    There is no noun where it is to be added, and something else always stays where it is to go.
    """
    others = [shape for shape in SHAPES if shape not in (edit.noun.shape, edit.to)]
    number = rng.integers(1, 3) if edit.task in ("remove", "add") else rng.integers(3)
    objects = [Object(str(shape), str(rng.choice(list(COLORS)))) for shape in rng.choice(others, number, replace=False)]
    if edit.task != "add":
        colors = [color for color in COLORS if color != edit.to]
        objects.append(replace(edit.noun, color=edit.noun.color or str(rng.choice(colors))))
    placed = place(Scene("attribute", tuple(objects)), rng)
    tint, shade = choose_backdrop(rng)
    return Picture(tint, shade, tuple(placed), tuple(choose_fill(obj.color, rng) for obj in placed))


def quarter(obj: Placed) -> tuple[bool, bool]:
    """In which quarter of the picture an object stands: whether on the right, and whether below."""
    return obj.x_px > SIZE_PX / 2, obj.y_px > SIZE_PX / 2


def apply(edit: Edit, source: Picture, rng: np.random.Generator) -> Picture:
    """A picture that shows the source after an edit, all else as it was."""
    placed, fills = list(source.placed), list(source.fills)
    if edit.task == "add":
        taken = [quarter(obj) for obj in placed]
        while True:
            (new,) = place(Scene("color", (edit.noun,)), rng)
            if quarter(new) not in taken:
                return replace(source, placed=(*placed, new), fills=(*fills, choose_fill(new.color, rng)))
    (index,) = (i for i, obj in enumerate(placed) if obj.shape == edit.noun.shape)
    match edit.task:
        case "recolor":
            placed[index] = replace(placed[index], color=str(edit.to))
            fills[index] = choose_fill(str(edit.to), rng)
        case "replace":
            placed[index] = replace(placed[index], shape=str(edit.to))
        case "remove":
            del placed[index], fills[index]
    return replace(source, placed=tuple(placed), fills=tuple(fills))
