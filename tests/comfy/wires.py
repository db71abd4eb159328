"""Where the wires of a graph run, as ComfyUI's canvas draws them, and ways around nodes that stand before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, width, height."""

BEND = 20  # how far a curve reaches beyond a reroute, as ComfyUI is set
STEP = 6  # between the points of a curve at which it is looked at
EDGE = 14  # how far a wire may be within the sides of its own nodes
CLEAR = 24  # what must be free beside a wire
FAR, KNEE = 400, 60  # an end from which a lane is farther has a knee, at this height
LANE = 14  # between wires that run beside each other
TURNS = ((22, 22), (34, 34), (46, 46), (22, 34), (34, 22), (22, 46), (46, 22), (34, 46), (46, 34))
"""How far from its two nodes a lane may begin and end."""


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes have more than their edges in common."""
    return all(a[side] + 1 < b[side] + b[side + 2] and b[side] + 1 < a[side] + a[side + 2] for side in (0, 1))


def contains(outer: Box, inner: Box) -> bool:
    """Whether a box is within another one, to a pixel."""
    return all(
        outer[side] <= inner[side] + 1 and inner[side] + inner[side + 2] <= outer[side] + outer[side + 2] + 1
        for side in (0, 1)
    )


def curve(points: Sequence[Point]) -> np.ndarray:
    """Points (N, 2) along a wire that leaves an output to the right, passes reroutes, and enters an input from left.

    A part between two of `points` is a cubic Bezier curve. Its control points are a quarter of its length away, at a
    reroute `BEND` at most, where both parts have the direction in the middle of theirs.
    """
    ways = [math.atan2(b[1] - a[1], b[0] - a[0]) for a, b in pairwise(points)]
    turns = [0.0, *(middle(come, go) for come, go in pairwise(ways)), 0.0]
    parts = []
    for number, (a, b) in enumerate(pairwise(points)):
        length = math.dist(a, b)
        out = length / 4 if number == 0 else min(length / 4, BEND)
        back = length / 4 if number == len(ways) - 1 else min(length / 4, BEND)
        c = (a[0] + out * math.cos(turns[number]), a[1] + out * math.sin(turns[number]))
        d = (b[0] - back * math.cos(turns[number + 1]), b[1] - back * math.sin(turns[number + 1]))
        t = np.linspace(0, 1, max(8, round(length / STEP)))[:, None]
        s = 1 - t
        parts.append(np.hstack([s**3, 3 * s * s * t, 3 * s * t * t, t**3]) @ np.array([a, c, d, b], float))
    return np.concatenate(parts)


def middle(come: float, go: float) -> float:
    """The direction half-way between two, in radians."""
    half = (come - go) / 2
    return come - (half + math.pi if abs(half) > math.pi / 2 else half)


def nodes_before(wire: np.ndarray, own: tuple[str, str], boxes: dict[str, Box], clear: float = 0) -> list[str]:
    """Names of the nodes that stand before a wire, or nearer to it than `clear`; of its own two all but the sides."""
    found = []
    for name, (left, top, width, height) in boxes.items():
        aside = -EDGE if name in own else clear
        x, y = wire[:, 0], wire[:, 1]
        within = (left - aside < x) & (x < left + width + aside) & (top - clear < y) & (y < top + height + clear)
        if within.any():
            found.append(name)
    return found


def route(
    start: Point, ends: Sequence[Point], own: tuple[str, str], boxes: dict[str, Box], taken: Sequence[Sequence[Point]]
) -> list[Point]:
    """Reroutes by which a wire passes no node: none where it does not anyway, else the ends of a level lane.

    Args:
        ends: where it may end, the likeliest place first: browsers differ in where they place a node's sockets.
        own: the names of the nodes that it connects.
        taken: the reroutes of other wires, from whose lanes this one keeps its distance.
    Raises:
        ValueError: there is no such lane.
    """

    def free(way: Sequence[Point]) -> bool:
        return not any(nodes_before(curve([start, *way, end]), own, boxes, CLEAR) for end in ends)

    if free([]):
        return []
    end = ends[0]
    edges = [edge for _, top, _, height in boxes.values() for edge in (top, top + height)]
    levels = {edge + side * (CLEAR + LANE * far) for edge, side, far in product(edges, (-1, 1), range(1, 8))}
    for level in sorted(levels, key=lambda level: (abs(level - start[1]) + abs(level - end[1]), level)):
        for out, back in TURNS:
            lane = [(start[0] + out, level), (end[0] - back, level)]
            level_part = np.linspace(*np.array(lane), 50)
            if nodes_before(level_part, own, boxes, CLEAR) or any(too_near(lane, other) for other in taken):
                continue
            way = [*knee(start, lane[0]), *lane, *knee(end, lane[1])]
            if free(way):
                return way
    raise ValueError(f"no way from {own[0]} to {own[1]}: leave more room between nodes")


def knee(end: Point, turn: Point) -> list[Point]:
    """A reroute near a far end of a wire, which would swing out wide without it."""
    away = turn[1] - end[1]
    return [(turn[0], end[1] + math.copysign(KNEE, away))] if abs(away) > FAR else []


def too_near(lane: Sequence[Point], other: Sequence[Point]) -> bool:
    """Whether a lane runs along another one, or turns where that one turns."""
    (left, level), (right, _) = sorted(lane)
    turns = [abs(a[0] - b[0]) < CLEAR and abs(a[1] - b[1]) < 2 * LANE for a, b in product(lane, other)]
    along = [
        min(a[0], b[0]) < right + LANE and left < max(a[0], b[0]) + LANE and abs(a[1] - level) < LANE
        for a, b in pairwise(other)
        if a[1] == b[1]
    ]
    return any(turns) or any(along)
