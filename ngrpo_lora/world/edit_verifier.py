"""Checks by rules on pixels whether a picture of the embedded world shows what its source shows after an edit.

    source -> the objects in it -> what must be there after the edit (`promises`) -> matching to the picture -> Verdict

The source is read as the picture is, by `verifier`'s eyes, so that any picture of the world can be edited, not only one
that was rendered here. Nothing is learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from ngrpo_lora.world.edits import Edit
from ngrpo_lora.world.scenes import Object
from ngrpo_lora.world.verifier import (
    CLUTTER_WIDTH_PX,
    MAX_CLUTTER_PX,
    Floats,
    Found,
    Verdict,
    find_blobs,
    find_clutter,
    is_match,
    read_background,
    read_paint,
    soft_match,
    to_channels,
    verdict_of,
)

# Strict thresholds, each with the width over which its soft score fades.
MAX_MOVE_PX, MOVE_WIDTH_PX = 3.0, 6.0  # of an object that was to stay where it is
MAX_GROWTH, GROWTH_WIDTH = 1.4, 0.5  # of its area, as a ratio either way, and as a logarithm
# Of the background's lightness, of 255. Its tint may be another: the embedded VAE keeps the one and not the other, and
# a reward that asks for what no model in its latents can draw is settled by the source alone.
MAX_SHIFT, SHIFT_WIDTH = 5.0, 20.0


@dataclass(frozen=True)
class Promise:
    """An object that must be there: what it is, and the object of the source whose place it has, if any.

    resized: whether its area may be another, as that of another shape is.
    """

    obj: Object
    before: Found | None = None
    resized: bool = False


def promises(edit: Edit, before: Sequence[Found]) -> list[Promise]:
    """What must be there after an edit.

    Args:
        before: the objects of the source.
    Raises:
        ValueError: the source does not show what is to be edited.
    """
    kept = [Promise(Object(found.shape, found.color), found) for found in before]
    if edit.task == "add":
        return [*kept, Promise(edit.noun)]
    meant = [i for i, promise in enumerate(kept) if is_noun(promise.obj, edit.noun)]
    if not meant:
        seen = " and ".join(str(promise.obj) for promise in kept) or "no object"
        raise ValueError(f"a source must show what {edit.instruction!r} is to edit, but this one shows {seen}")
    promise = kept[meant[0]]  # the largest one, where there are several
    match edit.task:
        case "recolor":
            kept[meant[0]] = replace(promise, obj=replace(promise.obj, color=edit.to))
        case "replace":
            kept[meant[0]] = replace(promise, obj=replace(promise.obj, shape=str(edit.to)), resized=True)
        case "remove":
            del kept[meant[0]]
    return kept


def is_noun(obj: Object, noun: Object) -> bool:
    """Whether an object may be called by a noun, with or without its colour."""
    return obj.shape == noun.shape and noun.color in (None, obj.color)


@dataclass(frozen=True)
class Seen:
    """What is seen in a source: its objects, and the lightness of its background, of 255; None where it has none."""

    found: tuple[Found, ...]
    lightness: float | None


def look(source: NDArray[np.uint8]) -> Seen:
    """Read a source, (H, H, 3) uint8 RGB; ValueError where it is no square picture."""
    pixels = to_channels(source)
    return Seen(tuple(found for found, _ in find_blobs(*read_paint(pixels))), lightness(pixels))


def lightness(pixels: Floats) -> float | None:
    """The mean of the background of (3, 64, 64) pixels over rows and channels, of 255; None where there is none."""
    rows = read_background(pixels)
    return None if rows is None else float(rows.mean())


def verify_edit(image: NDArray[np.uint8], source: Seen, edit: Edit) -> Verdict:
    """Judge a picture against what its source must be after an edit.

        soft   = mean_i(match_i place_i size_i) * exp(-clutter / 150 px) * exp(-shift / 20)
        graded = 0.75 + 0.25 soft  if strict  else  0.75 soft

    over the promised objects i, each matched to another blob: `match` is its shape and colour as of `verifier.verify`;
    `place` and `size` fall with the distance and the ratio of areas to the object of the source that it was, and are 1
    for what is new. An unmatched object scores 0, an extra blob is clutter, and `shift` is how far the background's
    lightness is from the source's. Where no object is to be left, their mean is 1.

    Args:
        image: (H, H, 3) uint8 RGB; resized to 64 px where H is not 64.
    Raises:
        ValueError: `image` is not a square uint8 RGB picture, or the source does not show what is to be edited.
    """
    wanted = promises(edit, source.found)
    pixels = to_channels(image)
    coverage, color_share = read_paint(pixels)
    blobs = find_blobs(coverage, color_share)
    scores = np.array([[score(found, promise) for found, _ in blobs] for promise in wanted])
    scores = scores.reshape(len(wanted), len(blobs))
    promised, matched = linear_sum_assignment(scores, maximize=True)

    pairs = [(blobs[i][0], wanted[p]) for p, i in zip(promised, matched, strict=True)]
    clutter_px = find_clutter(coverage, [blobs[i][1] for i in matched])
    light, shift = lightness(pixels), 255.0
    if light is not None and source.lightness is not None:
        shift = abs(light - source.lightness)
    objects = scores[promised, matched].sum() / len(wanted) if wanted else 1.0
    soft = float(objects * math.exp(-clutter_px / CLUTTER_WIDTH_PX - shift / SHIFT_WIDTH))
    strict = (
        len(pairs) == len(wanted)
        and all(is_kept(*pair) for pair in pairs)
        and clutter_px <= MAX_CLUTTER_PX
        and shift <= MAX_SHIFT
    )
    return verdict_of(strict, soft, blobs, clutter_px)


def score(found: Found, promise: Promise) -> float:
    """How well an object keeps a promise, in [0, 1]."""
    match, before = soft_match(found, promise.obj), promise.before
    if before is None:
        return match
    fades = max(0.0, moved_px(found, before) - MAX_MOVE_PX) / MOVE_WIDTH_PX
    if not promise.resized:
        fades += max(0.0, growth(found, before) - math.log(MAX_GROWTH)) / GROWTH_WIDTH
    return match * math.exp(-fades)


def is_kept(found: Found, promise: Promise) -> bool:
    """Whether an object keeps a promise by the strict thresholds."""
    before = promise.before
    return is_match(found, promise.obj) and (
        before is None
        or (
            moved_px(found, before) <= MAX_MOVE_PX
            and (promise.resized or growth(found, before) <= math.log(MAX_GROWTH))
        )
    )


def moved_px(found: Found, before: Found) -> float:
    """How far an object is from where it was."""
    return math.hypot(found.x_px - before.x_px, found.y_px - before.y_px)


def growth(found: Found, before: Found) -> float:
    """By how much the logarithm of an object's area has changed, either way."""
    return abs(math.log(found.area_px / before.area_px))
