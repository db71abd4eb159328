"""Curves over iterations as inline SVG, in the colours of the page, so that they are legible in light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ngrpo_lora.evaluation.report.markup import Html, escaped

__all__ = ["Line", "chart", "ticks"]

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 8, 38  # of the axes, to the picture's edges
COLORS = 6  # of `page.html`, after which they begin again
Place = Callable[[float, float], tuple[float, float]]
"""From iteration and value to a place in the picture."""
MOST_POINTS = 120  # of a line; more are averaged


@dataclass(frozen=True)
class Line:
    """A curve: points (iteration, value), and half the height of a band around each of them.

    color: number of the colour. dots: mark every point. faint: draw it thin, behind what matters.
    """

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()
    color: int = 0
    dots: bool = False
    faint: bool = False


def chart(title: str, label: str, lines: Sequence[Line], note: str = "") -> Html:
    """A figure with its axes, a legend where there are several lines, and a sentence below; empty without points.

    Args:
        label: what the upright axis shows.
    """
    lines = [thinned(line) for line in lines if line.points]
    if not lines:
        return Html("")
    right = max(max(x for x, _ in line.points) for line in lines) or 1
    low, high = limits(lines)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / right, (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [*grid(place, right, low, high, label)]
    for line in lines:
        parts += drawn(line, place)
    told = "; ".join(f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(f"{title}: {told}")}">'
        f"{''.join(parts)}</svg>"
    )
    names = [*lines, *(Line("one standard deviation", (), color=line.color) for line in lines if line.spread)]
    keys = [
        f'<li><i class="c{line.color % COLORS}{kind}"></i><bdi>{escaped(line.name)}</bdi></li>'
        for line in names
        for kind in [" faint" if line.faint else "" if line.points else " band"]
    ]
    legend = f'<ul class="legend">{"".join(keys)}</ul>' if len(names) > 1 else ""
    below = f'<p class="faint">{escaped(note)}</p>' if note else ""
    return Html(
        f'<figure class="chart"><figcaption dir="auto">{escaped(title)}</figcaption>{svg}{legend}{below}</figure>'
    )


def limits(lines: Sequence[Line]) -> tuple[float, float]:
    """The lowest and the highest value that lines and bands reach, with some air."""
    values = [y for line in lines for _, y in line.points]
    for line in lines:
        for (_, y), half in zip(line.points, line.spread, strict=False):
            values += [y - half, y + half]
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return (low - air if low < 0 else max(0.0, low - air)), high + air


def grid(place: Place, right: float, low: float, high: float, label: str) -> list[str]:
    """The axes' numbers, the lines across, and what both axes show."""
    parts, foot = [], HEIGHT - BOTTOM
    for value in ticks(low, high):
        _, y = place(0, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(0, right):
        if value == int(value):  # an iteration
            x, _ = place(value, low)
            parts.append(f'<text x="{x:.1f}" y="{foot + 16}" text-anchor="middle">{int(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{foot}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">iteration</text>')
    middle = (TOP + foot) / 2
    parts.append(f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escaped(label)}</text>')
    return parts


def drawn(line: Line, place: Place) -> list[str]:
    """The band, the line and the dots of a curve."""
    color, parts = f"c{line.color % COLORS}", []
    if line.spread:
        bounds = [(x, y + half) for (x, y), half in zip(line.points, line.spread, strict=True)]
        bounds += [(x, y - half) for (x, y), half in zip(line.points, line.spread, strict=True)][::-1]
        parts.append(f'<polygon class="{color} band" points="{coordinates(bounds, place)}"/>')
    faint = " faint" if line.faint else ""
    parts.append(f'<polyline class="{color}{faint}" points="{coordinates(line.points, place)}"/>')
    if line.dots or len(line.points) == 1:
        for point in line.points:
            x, y = place(*point)
            name = escaped(f"{line.name}, iteration {point[0]:g}: {point[1]:.4g}")
            parts.append(f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{name}</title></circle>')
    return parts


def coordinates(points: Sequence[tuple[float, float]], place: Place) -> str:
    """Points as an SVG attribute."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))


def thinned(line: Line) -> Line:
    """A line of at most MOST_POINTS points, each of them a mean of as many that follow one another."""
    size = math.ceil(len(line.points) / MOST_POINTS)
    if size == 1:
        return line
    starts = range(0, len(line.points), size)

    def means(values: Sequence[float]) -> list[float]:
        return [sum(part) / len(part) for part in (values[start : start + size] for start in starts)]

    xs, ys = (means(values) for values in zip(*line.points, strict=True))
    spread = means(line.spread) if line.spread else ()
    return Line(line.name, [*zip(xs, ys, strict=True)], spread, line.color, line.dots, line.faint)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two others, at most `most` of them, one, two or five times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= most - 1)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
