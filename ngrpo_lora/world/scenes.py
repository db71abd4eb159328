"""Captioned scenes of coloured shapes: GenEval's six tasks (arXiv 2310.11513) in a world of 64 px.

A `Scene` is what a caption promises; `place` chooses everything that the caption leaves open, `render`
draws it. Every choice comes from the `numpy.random.Generator` in hand, so a seed is a picture.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageDraw

Task = Literal["single", "two", "count", "color", "position", "attribute"]
Relation = Literal["left of", "right of", "above", "below"]

TASKS: tuple[Task, ...] = ("single", "two", "count", "color", "position", "attribute")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 135, 20),
    "yellow": (250, 210, 40),
    "green": (50, 160, 70),
    "blue": (40, 95, 205),
    "purple": (140, 60, 175),
}
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
OPPOSITE: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a drawing of {}")

SIZE_PX = 64
SUPERSAMPLE = 4

LIGHT, TINT, SHADE = (225.0, 248.0), 7.0, (4.0, 14.0)  # of 255: the background's light, tint and fall from top to foot
FILL = (0.94, 1.04)  # by what every channel of a colour may differ from COLORS


class HasMeaning(Protocol):
    """What can be said in several ways, all of the same meaning."""

    @property
    def meaning(self) -> str: ...


Told = TypeVar("Told", bound=HasMeaning)


@dataclass(frozen=True)
class Object:
    """One object of a caption; `color` None means that any colour will do."""

    shape: str
    color: str | None = None

    def __str__(self) -> str:
        words = f"{self.color} {self.shape}" if self.color else self.shape
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """What a caption promises: all the objects of the picture and, for two of them, perhaps their relation."""

    task: Task
    objects: tuple[Object, ...]
    relation: Relation | None = None

    @property
    def meaning(self) -> str:
        """One string for all captions that promise the same: `a star above a cross`, `a cross below a star`."""
        if self.task == "count" or len(self.objects) == 1:
            return self.caption
        first, second = self.objects
        relation = OPPOSITE[self.relation] if self.relation else None
        return min(self.caption, Scene(self.task, (second, first), relation).caption)

    @property
    def caption(self) -> str:
        """The scene in words, without a template: `a red star`, `three hearts`, `a star above a cross`."""
        if self.task == "count":
            shape = self.objects[0].shape
            return f"{NUMBERS[len(self.objects)]} {plural(shape)}"
        joint = f" {self.relation} " if self.relation else " and "
        return joint.join(map(str, self.objects))


@dataclass(frozen=True)
class Placed:
    """An object on the canvas: centre and radius of its circumscribed circle in px, angle in radians."""

    shape: str
    color: str
    x_px: float
    y_px: float
    radius_px: float
    angle: float = 0.0


def plural(shape: str) -> str:
    """The plural of a shape's name, such as `crosses` or `stars`."""
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def all_scenes(task: Task) -> list[Scene]:
    """Every scene of one task, in a fixed order."""
    pairs = list(itertools.permutations(SHAPES, 2))
    match task:
        case "single":
            return [Scene(task, (Object(shape),)) for shape in SHAPES]
        case "two":
            return [Scene(task, (Object(a), Object(b))) for a, b in pairs]
        case "count":
            return [Scene(task, (Object(shape),) * n) for shape in SHAPES for n in NUMBERS]
        case "color":
            return [Scene(task, (Object(shape, color),)) for shape in SHAPES for color in COLORS]
        case "position":
            return [Scene(task, (Object(a), Object(b)), r) for a, b in pairs for r in RELATIONS]
        case "attribute":
            colors = list(itertools.permutations(COLORS, 2))
            return [Scene(task, (Object(a, c), Object(b, d))) for a, b in pairs for c, d in colors]


def split_scenes(task: Task, held_out_share: float = 0.2) -> tuple[list[Scene], list[Scene]]:
    """(train, held-out) scenes of a task, as `split_by_meaning` divides them."""
    return split_by_meaning(all_scenes(task), held_out_share)


def split_by_meaning(items: Sequence[Told], held_out_share: float) -> tuple[list[Told], list[Told]]:
    """(train, held-out) items, with no meaning in both; the same on every machine (by SHA-256)."""
    meanings = sorted({item.meaning for item in items}, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = set(meanings[: math.ceil(held_out_share * len(meanings))])
    return [i for i in items if i.meaning not in held_out], [i for i in items if i.meaning in held_out]


def parse(prompt: str) -> Scene:
    """The scene that a prompt describes; case and surrounding white space do not matter.

    Raises:
        ValueError: the prompt is not one of the world's captions in one of `TEMPLATES`.
    """
    try:
        return _scenes_by_prompt()[prompt.strip().lower()]
    except KeyError:
        raise ValueError(
            f"a prompt must be a caption of the world, such as 'a photo of a red star', got {prompt!r}; "
            "take one from all_scenes"
        ) from None


@functools.cache
def _scenes_by_prompt() -> dict[str, Scene]:
    scenes = [scene for task in TASKS for scene in all_scenes(task)]
    return {template.format(scene.caption): scene for scene in scenes for template in TEMPLATES}


def place(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Set upright objects near the centres of a 2 x 2 board, so that the caption is true; the rest is random."""
    cells = [(x, y) for y in range(2) for x in range(2)]
    cell_px = SIZE_PX / 2
    colors = choose_colors(scene, rng)
    while True:
        chosen = [cells[i] for i in rng.permutation(len(cells))[: len(scene.objects)]]
        placed = [
            Placed(
                obj.shape,
                color,
                x_px=(x + 0.5) * cell_px + rng.uniform(-2, 2),
                y_px=(y + 0.5) * cell_px + rng.uniform(-2, 2),
                radius_px=rng.uniform(10.5, 13.5),
            )
            for obj, color, (x, y) in zip(scene.objects, colors, chosen, strict=True)
        ]
        if scene.relation is None or holds(scene.relation, placed[0], placed[1]):
            return placed


def scatter(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Scatter objects of any size and angle over the canvas, not touching; the VAE is trained on these."""
    colors = choose_colors(scene, rng)
    low, high = {1: (12, 18), 2: (10, 14), 3: (9, 12), 4: (8, 11)}[len(scene.objects)]
    while True:
        placed = []
        for obj, color in zip(scene.objects, colors, strict=True):
            radius = rng.uniform(low, high)
            x, y = rng.uniform(radius + 2, SIZE_PX - radius - 2, 2)
            placed.append(Placed(obj.shape, color, x, y, radius, rng.uniform(-0.2, 0.2)))
        apart = all(
            math.hypot(a.x_px - b.x_px, a.y_px - b.y_px) >= a.radius_px + b.radius_px + 2
            for a, b in itertools.combinations(placed, 2)
        )
        if apart and (scene.relation is None or holds(scene.relation, placed[0], placed[1])):
            return placed


def choose_colors(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Colours of a scene's objects: the promised ones, random for the rest; the objects of a count share one."""
    chance = [str(color) for color in rng.choice(list(COLORS), len(scene.objects))]
    if scene.task == "count":
        return chance[:1] * len(chance)
    return [obj.color or color for obj, color in zip(scene.objects, chance, strict=True)]


def holds(relation: Relation, a: Placed, b: Placed) -> bool:
    """Whether `a` is clearly left of (right of, above, below) `b`: that axis dominates the offset."""
    dx, dy = a.x_px - b.x_px, a.y_px - b.y_px
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 1.5 * abs(across)


def draw(placed: list[Placed], rng: np.random.Generator) -> np.ndarray:
    """Paint objects on a pale gradient. Returns (64, 64, 3) uint8."""
    tint, shade = choose_backdrop(rng)
    return paint(tint, shade, placed, [choose_fill(obj.color, rng) for obj in placed])


def choose_backdrop(rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A pale background as `paint` takes it: its tint (3,) at the top, and by what it falls to the foot, of 255."""
    hue, light, shade = rng.uniform(0, 2 * math.pi), rng.uniform(*LIGHT), rng.uniform(*SHADE)
    return light + TINT * np.cos(hue + np.array([0, 2, 4]) * math.pi / 3), shade


def choose_fill(color: str, rng: np.random.Generator) -> list[float]:
    """A fill (3,) of 255 that goes by the name of a colour."""
    return [min(c * rng.uniform(*FILL), 255.0) for c in COLORS[color]]


def paint(tint: np.ndarray, shade: float, placed: Sequence[Placed], fills: Sequence[Sequence[float]]) -> np.ndarray:
    """Paint objects, each in its fill, on a background that falls evenly from `tint` at the top by `shade`.

    Args:
        tint: (3,) of 255.
        shade: of 255.
        fills: one colour (3,) an object, of 255; fractions are cut off.
    Returns:
        (64, 64, 3) uint8.
    """
    rows = backdrop(tint, shade)
    image = Image.fromarray(np.repeat(rows[:, None], len(rows), 1))
    canvas = ImageDraw.Draw(image)
    for obj, (red, green, blue) in zip(placed, fills, strict=True):
        canvas.polygon(supersampled(obj), fill=(int(red), int(green), int(blue)))
    return np.asarray(image.reduce(SUPERSAMPLE))


def backdrop(tint: np.ndarray, shade: float) -> np.ndarray:
    """The colour of every row of the background, (64 * SUPERSAMPLE, 3) uint8; arguments as of `paint`."""
    height = np.linspace(0, 1, SIZE_PX * SUPERSAMPLE)[:, None]
    return np.clip(tint - shade * height, 0, 255).round().astype(np.uint8)


def supersampled(obj: Placed) -> list[float]:
    """The outline x, y, x, y, ... of an object where it is painted, on `SUPERSAMPLE` times the picture's pixels."""
    return (outline(obj) * SUPERSAMPLE).ravel().tolist()


def outline(obj: Placed) -> np.ndarray:
    """The closed outline of an object in px: (N, 2) points (x, y)."""
    points = unit_outline(obj.shape) * obj.radius_px
    cos, sin = math.cos(obj.angle), math.sin(obj.angle)
    return points @ np.array([[cos, sin], [-sin, cos]]) + (obj.x_px, obj.y_px)


def unit_outline(shape: str) -> np.ndarray:
    """The outline of a shape within the unit circle, y down: (N, 2)."""
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x, y - 2], 1) / 17
    if shape == "cross":
        a, b = 0.94, 0.32
        corners = [
            (b, a),
            (b, b),
            (a, b),
            (a, -b),
            (b, -b),
            (b, -a),
            (-b, -a),
            (-b, -b),
            (-a, -b),
            (-a, b),
            (-b, b),
            (-b, a),
        ]
        return np.array(corners)
    corners, inner = {"circle": (60, 1.0), "square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.42)}[shape]
    turn = math.pi / 4 if shape == "square" else -math.pi / 2
    t = turn + 2 * math.pi * np.arange(corners) / corners
    radii = np.where(np.arange(corners) % 2 == 0, 1.0, inner)
    scale = {"circle": 0.88, "triangle": 1.0}.get(shape, 1.0)
    return np.stack([np.cos(t), np.sin(t)], 1) * radii[:, None] * scale


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One true picture of a scene: (64, 64, 3) uint8."""
    return draw(place(scene, rng), rng)


def sample_scene(
    rng: np.random.Generator, scenes: dict[Task, list[Scene]], shares: dict[Task, float] | None = None
) -> Scene:
    """A scene of a task drawn by its share; without shares, all tasks alike."""
    shares = shares or dict.fromkeys(TASKS, 1.0)
    weights = np.array([shares[task] for task in TASKS])
    pool = scenes[TASKS[rng.choice(len(TASKS), p=weights / weights.sum())]]
    return pool[rng.integers(len(pool))]
