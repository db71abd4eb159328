"""How far a picture of the embedded world is from what its renderer can draw.

    background and blobs, as the verifier finds them -> the nearest picture that `scenes.draw` could have made -> RMS

The verifier reads which shapes and colours are there, and forgives blur, blotches and ghosts. What it forgives is what
this measures; it does not look at the caption.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ngrpo_lora.world.scenes import (
    COLORS,
    FILL,
    LIGHT,
    NUMBERS,
    SHADE,
    SHAPES,
    SIZE_PX,
    SUPERSAMPLE,
    TINT,
    Placed,
    backdrop,
    paint,
    supersampled,
    unit_outline,
)
from ngrpo_lora.world.verifier import Floats, Found, Mask, find_blobs, grown, read_background, read_paint, to_channels

RADIUS_PX, MAX_ANGLE, BORDER_PX = (8.0, 18.0), 0.2, 0.5  # what `place` and `scatter` keep to
ROOM_PX = 6  # around an object, for the search for its place
MAX_TRIALS, LEAST_STEP_PX = 10, 0.05  # of this search


@dataclass(frozen=True)
class View:
    """The square of a picture in which an object is looked for.

    left, top: its corner in the picture, in px.
    away: (3, S, S) of 255, picture minus background.
    bare: (3, S) of 255, the rows of the background.
    free: (S, S), what counts: all but the other objects.
    """

    left: int
    top: int
    away: Floats
    bare: Floats
    free: Mask


@dataclass(frozen=True)
class Fit:
    """An object that the renderer could draw: its coverage (S, S) of a view, and its fill (3,) of 255.

    error: the sum of the squared differences to what counts in the view.
    """

    placed: Placed
    coverage: Floats
    fill: Floats
    error: float


def distance(image: NDArray[np.uint8]) -> float:
    """The RMS difference between a picture and `nearest(image)`, over all pixels and channels, of 255.

    Args:
        image: (H, H, 3) uint8 RGB; resized to 64 px where H is not 64.
    Raises:
        ValueError: `image` is not a square uint8 RGB picture.
    """
    pixels = to_channels(image)
    return math.sqrt(np.square(pixels - nearest(image).transpose(2, 0, 1)).mean())


def nearest(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture nearest to `image` that the renderer could have drawn, (64, 64, 3) uint8.

    The background is the gradient through the picture's pale pixels, brought to the nearest that `scenes.draw` chooses
    from; where there is none, the gradient through all pixels. Every blob of the verifier, at most the four largest,
    becomes the shape that it resembles most, with the centre, radius, angle and fill of least squares within what the
    renderer keeps to. Where there is no blob, it becomes the one object that fits best, for no caption has none.

    Args:
        image: as for `distance`.
    """
    pixels = to_channels(image)
    tint, shade = _background(pixels)
    bare = backdrop(tint, shade).reshape(SIZE_PX, SUPERSAMPLE, 3).mean(1).T.astype(np.float32)  # (3, 64), its rows
    blobs = find_blobs(*read_paint(pixels))[: max(NUMBERS)]
    masks = np.array([mask for _, mask in blobs]).reshape(-1, SIZE_PX, SIZE_PX)
    others = [grown(np.any(np.delete(masks, index, 0), axis=0), 1) for index in range(len(masks))]
    fits = [_fit(_start(found), pixels, bare, ~other) for (found, _), other in zip(blobs, others, strict=True)]
    if not fits:
        middle, everywhere = SIZE_PX / 2, np.ones((SIZE_PX, SIZE_PX), dtype=bool)
        starts = [Placed(shape, "red", middle, middle, RADIUS_PX[0]) for shape in SHAPES]
        fits = [min((_fit(start, pixels, bare, everywhere) for start in starts), key=lambda fit: fit.error)]
    return paint(tint, shade, [fit.placed for fit in fits], [fit.fill.tolist() for fit in fits])


def _background(pixels: Floats) -> tuple[Floats, float]:
    """The tint (3,) and the shade nearest to the picture's background, as `scenes.draw` might choose them."""
    rows = read_background(pixels)
    if rows is None:
        rows = pixels.mean(2)
    slope = np.polyfit(np.arange(SIZE_PX), rows.mean(0), 1)[0]
    shade = float(np.clip(-slope * SIZE_PX, *SHADE))
    middle = rows.mean(1)
    # The three channels' cosines are 120 degrees apart: they add up to 0, their squares to 3 / 2.
    away = middle - middle.mean()
    if not away.any():
        away = np.array([1.0, -0.5, -0.5])
    light = np.clip(middle.mean() + shade / 2, *LIGHT)
    return light + away * (TINT * math.sqrt(1.5) / np.linalg.norm(away)), shade


def _start(found: Found) -> Placed:
    """The upright object with the centre of mass and the area that the verifier found."""
    area, x, y = _unit_moments(found.shape)
    radius = math.sqrt(found.area_px / area)
    # The verifier counts from the middle of the first pixel.
    return _within_limits(
        Placed(found.shape, found.color, found.x_px + 0.5 - x * radius, found.y_px + 0.5 - y * radius, radius)
    )


@functools.cache
def _unit_moments(shape: str) -> tuple[float, float, float]:
    """The area of a shape within the unit circle and its centre of mass (x, y), by the shoelace formula."""
    (x, y), (next_x, next_y) = unit_outline(shape).T, np.roll(unit_outline(shape), -1, 0).T
    cross = x * next_y - next_x * y
    area = cross.sum() / 2
    return abs(area), float((x + next_x) @ cross / (6 * area)), float((y + next_y) @ cross / (6 * area))


def _within_limits(placed: Placed) -> Placed:
    radius = float(np.clip(placed.radius_px, *RADIUS_PX))
    edges = radius + BORDER_PX, SIZE_PX - radius - BORDER_PX
    x, y = (float(np.clip(centre, *edges)) for centre in (placed.x_px, placed.y_px))
    return Placed(placed.shape, placed.color, x, y, radius, float(np.clip(placed.angle, -MAX_ANGLE, MAX_ANGLE)))


def _fit(start: Placed, pixels: Floats, bare: Floats, free: Mask) -> Fit:
    """Move, turn and scale an object until it fits best: Gauss-Newton, with half the step where that leads uphill.

    Args:
        pixels: (3, 64, 64) of 255.
        bare: (3, 64) of 255, the rows of the background.
        free: (64, 64), what counts: all but the other objects.
    """
    view = _view(start, pixels, bare, free)
    fit = _evaluate(start, view)
    step = _step(fit, view)
    for _ in range(MAX_TRIALS):
        if np.abs(step).max() < LEAST_STEP_PX:
            break
        trial = _evaluate(_moved(fit.placed, step), view)
        if trial.error < fit.error:
            fit, step = trial, _step(trial, view)
        else:  # edges are drawn to a quarter of a pixel, so that the error has steps of its own
            step = step / 2
    return fit


def _view(placed: Placed, pixels: Floats, bare: Floats, free: Mask) -> View:
    side = min(SIZE_PX, 2 * round(placed.radius_px + ROOM_PX))
    left, top = (int(np.clip(round(centre - side / 2), 0, SIZE_PX - side)) for centre in (placed.x_px, placed.y_px))
    rows, columns = slice(top, top + side), slice(left, left + side)
    away = pixels[:, rows, columns] - bare[:, rows, None]
    return View(left, top, away, bare[:, rows], free[rows, columns])


def _evaluate(placed: Placed, view: View) -> Fit:
    """Draw an object where it stands, in its best fill, and compare it with the picture."""
    side = len(view.free)
    canvas = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
    seen = replace(placed, x_px=placed.x_px - view.left, y_px=placed.y_px - view.top)
    ImageDraw.Draw(canvas).polygon(supersampled(seen), fill=255)
    coverage = np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32) / 255
    fill = _fill(view, coverage * view.free)
    missing = view.away - coverage * (fill[:, None] - view.bare)[:, :, None]
    return Fit(placed, coverage, fill, float((np.square(missing).sum(0) * view.free).sum()))


def _fill(view: View, coverage: Floats) -> Floats:
    """The fill (3,) of 255 nearest to that of least squares that the renderer may choose for some colour."""
    square = np.square(coverage)
    wanted = (np.tensordot(view.away, coverage, 2) + view.bare @ square.sum(1)) / square.sum()
    palette = np.array(list(COLORS.values()))  # (6, 3)
    allowed = np.clip(wanted, palette * FILL[0], np.minimum(palette * FILL[1], 255)).round()
    return allowed[np.square(allowed - wanted).sum(1).argmin()]


def _step(fit: Fit, view: View) -> Floats:
    """The Gauss-Newton step (4,) in px, slightly damped: right, down, growth of the radius, turn along the rim.

    The coverage moves with the outline, down its own gradient. A circle's turn changes nothing, which damping bears.
    """
    placed, side = fit.placed, len(view.free)
    y, x = np.mgrid[:side, :side] + 0.5
    out_x = (x + view.left - placed.x_px) / placed.radius_px
    out_y = (y + view.top - placed.y_px) / placed.radius_px
    down, right = np.gradient(fit.coverage)
    moves = -np.stack([right, down, right * out_x + down * out_y, down * out_x - right * out_y])
    toward = fit.fill[:, None] - view.bare  # (3, S)
    reach = np.square(toward).sum(0)[:, None]
    missing = np.einsum("crk,cr->rk", view.away, toward) - fit.coverage * reach
    normal = np.tensordot(moves * (reach * view.free), moves, ([1, 2], [1, 2]))  # (4, 4)
    pull = np.tensordot(moves, missing * view.free, 2)
    return np.linalg.solve(normal + 1e-3 * np.trace(normal) * np.eye(4), pull)


def _moved(placed: Placed, step: Floats) -> Placed:
    """An object after a step (4,), as `_step` gives it, within what the renderer keeps to."""
    right, down, growth, turn = step.tolist()
    return _within_limits(
        replace(
            placed,
            x_px=placed.x_px + right,
            y_px=placed.y_px + down,
            radius_px=placed.radius_px + growth,
            angle=placed.angle + turn / placed.radius_px,
        )
    )
