"""The distance to what the renderer draws: near 0 for its own pictures, and larger the more a picture is spoilt."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from ngrpo_lora.world.manifold import distance, nearest
from ngrpo_lora.world.scenes import COLORS, SHAPES, TASKS, Placed, all_scenes, draw, paint, place, scatter
from ngrpo_lora.world.verifier import find_blobs, read_paint, to_channels

LAYOUTS = (place, scatter)


@pytest.fixture(scope="module")
def renders() -> list[np.ndarray]:
    """96 true pictures: of every task as many, half on the board, half strewn and turned."""
    rng = np.random.default_rng(0)
    pools = [all_scenes(task) for task in TASKS for _ in range(8)]
    return [draw(layout(pool[rng.integers(len(pool))], rng), rng) for layout in LAYOUTS for pool in pools]


def blurred(picture: np.ndarray, radius_px: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius_px)))


def noisy(picture: np.ndarray, deviation: float) -> np.ndarray:
    return spoilt(picture, np.random.default_rng(1).normal(0, deviation, picture.shape))


def blotchy(picture: np.ndarray, deviation: float) -> np.ndarray:
    """Smooth spots of about 7 px, all over the picture."""
    spots = ndimage.gaussian_filter(np.random.default_rng(2).normal(size=picture.shape), (3, 3, 0))
    return spoilt(picture, spots * (deviation / spots.std()))


def spoilt(picture: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.clip(picture + by, 0, 255).astype(np.uint8)


def test_what_the_renderer_draws_is_next_to_itself(renders: list[np.ndarray]):
    """0.1 of 255 is left by rounding at the true places; the rest is quarters of a pixel along edges."""
    found = [distance(picture) for picture in renders]
    assert np.mean(found) < 1.3  # 1.1 was measured
    assert max(found) < 5  # 3.9


@pytest.mark.parametrize(
    ("spoil", "amounts", "least"),
    [(blurred, (0.5, 1, 2, 4), 2.5), (noisy, (4, 8, 16, 32), 3.5), (blotchy, (4, 8, 16, 32), 3.5)],
)
def test_the_distance_grows_with_blur_noise_and_blotches(spoil, amounts, least: float, renders: list[np.ndarray]):
    found = np.array([[distance(spoil(picture, amount)) for amount in amounts] for picture in renders[::4]])
    assert found[:, 0].mean() > least  # even the least is more than any true picture's mean
    assert (np.diff(found, axis=1) > 0).all()  # of each picture
    assert (np.diff(found.mean(0)) > 2.5).all()


@pytest.mark.parametrize("color", COLORS)
def test_a_blotch_within_an_object_counts_and_the_objects_own_colour_does_not(color: str):
    plain = draw([Placed("square", color, 32, 32, 14)], np.random.default_rng(0))
    other = next(value for name, value in COLORS.items() if name != color)
    blotch = plain.copy()
    blotch[28:36, 28:36] = (blotch[28:36, 28:36].astype(int) + other) // 2
    assert distance(plain) < 2.5
    assert distance(blotch) > distance(plain) + 2


def test_garbage_is_far_away():
    rng = np.random.default_rng(0)
    empty = draw([], rng)
    for picture, least in (
        (empty, 12),  # no caption has no object
        (np.full_like(empty, 255), 15),
        (np.zeros_like(empty), 150),
        (np.full_like(empty, COLORS["red"]), 100),
        (rng.integers(0, 256, empty.shape, dtype=np.uint8), 80),
    ):
        assert distance(picture) > least


def test_what_no_layout_does_is_not_drawn():
    """A fifth object, one that is too large, one that is turned too far, and one that leaves the picture."""
    rng = np.random.default_rng(0)
    corners = [Placed("circle", "red", x, y, 9) for x in (12, 52) for y in (12, 52)]
    assert distance(draw(corners, rng)) < 2
    assert distance(draw([*corners, Placed("circle", "red", 32, 32, 9)], rng)) > 20
    for wrong in (
        Placed("square", "blue", 32, 32, 25),
        Placed("triangle", "blue", 32, 32, 16, 0.5),
        Placed("circle", "blue", 2, 32, 12),
    ):
        assert distance(draw([wrong], rng)) > 8


@pytest.mark.parametrize(
    ("tint", "shade", "fill", "least"),
    [
        ((240, 240, 240), 8, (214, 40, 120), 12),  # between red and purple
        ((240, 240, 240), 8, (150, 28, 28), 8),  # too dark a red
        ((215, 215, 215), 8, (214, 40, 40), 8),  # too dark a background
        ((248, 230, 212), 8, (214, 40, 40), 5),  # too much of a tint
        ((240, 240, 240), 40, (214, 40, 40), 5),  # too steep a gradient
    ],
)
def test_what_no_draw_paints_is_not_painted(tint, shade: float, fill, least: float):
    square = Placed("square", "red", 32, 32, 14)
    neutral = np.array([1.0, -0.5, -0.5]) * 7  # a tint that `draw` may choose
    assert distance(paint(np.full(3, 240.0) + neutral, 8, [square], [COLORS["red"]])) < 2.5
    assert distance(paint(np.array(tint) + (neutral if len({*tint}) == 1 else 0), shade, [square], [fill])) > least


@pytest.mark.parametrize("shape", SHAPES)
def test_the_nearest_picture_has_the_same_objects_and_is_next_to_itself(shape: str):
    rng = np.random.default_rng(0)
    placed = [Placed(shape, "purple", 20.3, 21.1, 11.2, 0.15), Placed(shape, "yellow", 43.9, 41.6, 12.7, -0.1)]
    picture = nearest(noisy(draw(placed, rng), 6))
    assert picture.dtype == np.uint8
    found = sorted((blob for blob, _ in find_blobs(*read_paint(to_channels(picture)))), key=lambda blob: blob.x_px)
    assert [(blob.shape, blob.color) for blob in found] == [(shape, "purple"), (shape, "yellow")]
    assert distance(picture) < 3


def test_the_size_of_a_picture_is_brought_to_the_worlds(renders: list[np.ndarray]):
    assert distance(np.kron(renders[0], np.ones((2, 2, 1), dtype=np.uint8))) == pytest.approx(distance(renders[0]))
    with pytest.raises(ValueError, match=r"image must be \(H, H, 3\) uint8, got \(64, 32, 3\)"):
        distance(renders[0][:, :32])
