"""Entropies and spreads of rendered pictures whose distributions are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from ngrpo_lora.world.freedom import entropy_bits, freedom
from ngrpo_lora.world.scenes import COLORS, TASKS, Placed, all_scenes, draw, paint, render

CELLS = [(x, y) for y in (16, 48) for x in (16, 48)]


def stars(*placed: tuple[str, tuple[int, int]]) -> Image.Image:
    objects = [Placed("star", color, *cell, 12) for color, cell in placed]
    return Image.fromarray(draw(objects, np.random.default_rng(0)))


def test_entropy_is_corrected_and_held_within_its_bounds():
    assert entropy_bits("aaaa", 6) == 0
    plain = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert entropy_bits("aaab", 6) == pytest.approx(plain + 1 / (8 * math.log(2)))
    assert entropy_bits("ab", 2) == 1
    rng = np.random.default_rng(0)
    drawn = [rng.choice(6, 30, p=(0.5, 0.2, 0.1, 0.1, 0.05, 0.05)) for _ in range(400)]
    true = -sum(p * math.log2(p) for p in (0.5, 0.2, 0.1, 0.1, 0.05, 0.05))
    plain = [entropy_bits(values, 6) - (len(set(values)) - 1) / (60 * math.log(2)) for values in map(list, drawn)]
    assert np.mean(plain) < true - 0.08
    assert np.mean([entropy_bits(list(values), 6) for values in drawn]) == pytest.approx(true, abs=0.03)


def test_rendered_pictures_are_as_free_as_the_renderer():
    rng = np.random.default_rng(0)
    scenes = [scene for task in TASKS for scene in (all_scenes(task) * 12)[:72]]
    found = freedom([Image.fromarray(render(scene, rng)) for scene in scenes], [scene.caption for scene in scenes])
    assert found["hue_bits"] == pytest.approx(math.log2(6), abs=0.03)
    assert found["place_bits"] == pytest.approx(2, abs=0.01)
    # Light, tint and half the shade: uniform over 23 and over 5, and 7 times a cosine, of 255.
    assert found["background_spread"] == pytest.approx(math.sqrt(23**2 / 12 + 7**2 / 2 + 5**2 / 12), rel=0.1)


@pytest.mark.parametrize(("names", "bits"), [([*COLORS], math.log2(6)), (["red", "green"], 1), (["red"], 0)])
def test_hues_are_of_free_objects_alone(names: list[str], bits: float):
    """Captions that name their colours, all of them blue here, do not count."""
    free = [stars((name, CELLS[0])) for name in names for _ in range(200 // len(names))]
    bound = [stars(("blue", CELLS[0]))] * 50
    found = freedom(free + bound, ["a star"] * len(free) + ["a photo of a blue star"] * len(bound))
    assert found["hue_bits"] == pytest.approx(bits, abs=0.02)


@pytest.mark.parametrize(("cells", "bits"), [(CELLS, 2), (CELLS[1:3], 1), (CELLS[:1], 0)])
def test_places_are_of_captions_that_fix_none(cells: list[tuple[int, int]], bits: float):
    free = [stars(("red", cell)) for cell in cells for _ in range(100 // len(cells))]
    square = Placed("square", "red", *CELLS[3], 12)
    bound = draw([Placed("star", "red", *CELLS[1], 12), square], np.random.default_rng(0))
    board = stars(*zip(itertools.repeat("red"), CELLS, strict=False))
    found = freedom(
        [*free, *[Image.fromarray(bound)] * 50, *[board] * 50],
        ["a red star"] * len(free) + ["a star above a square"] * 50 + ["four stars"] * 50,
    )
    assert found["place_bits"] == pytest.approx(bits, abs=0.02)


def test_the_backgrounds_spread_is_of_its_colour_and_not_of_what_stands_on_it():
    def picture(light: float, *objects: Placed) -> Image.Image:
        fills = [COLORS[obj.color] for obj in objects]
        return Image.fromarray(paint(light + np.array([7.0, -3.5, -3.5]), 8.0, objects, fills))

    circle, star = Placed("circle", "red", 20, 20, 12), Placed("star", "blue", 44, 40, 14)
    pictures = [picture(230, circle), picture(240, star), picture(230, star), picture(240, circle)]
    prompts = ["a circle", "a star", "a star", "a circle"]
    assert freedom(pictures, prompts)["background_spread"] == pytest.approx(5, abs=0.1)
    same = freedom([picture(230, circle), picture(230, star)], prompts[:2])
    assert same["background_spread"] == pytest.approx(0, abs=0.1)


def test_diversity_is_of_pictures_that_promise_the_same():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    first, second, third = map(Image.fromarray, pixels)
    difference = np.sqrt(np.square(pixels[0].astype(float) - pixels[1]).mean())
    found = freedom([first, third, second], ["a star and a cross", "a red heart", "a drawing of a cross and a star"])
    assert found["diversity"] == pytest.approx(difference)
    assert freedom([first, first], ["a red heart"] * 2)["diversity"] == 0


def test_what_is_nowhere_is_left_out():
    black = Image.new("RGB", (64, 64))
    assert freedom([black], ["a star"]) == {}
    assert freedom([], []) == {}
    with pytest.raises(ValueError, match="must be a caption of the world"):
        freedom([black], ["a cat"])
