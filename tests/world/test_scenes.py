import hashlib
import itertools
import math

import numpy as np
import pytest

from ngrpo_lora.world.scenes import TASKS, TEMPLATES, all_scenes, holds, parse, place, render, scatter, split_scenes

COUNTS = {"single": 6, "two": 30, "count": 18, "color": 36, "position": 120, "attribute": 900}


@pytest.mark.parametrize("task", TASKS)
def test_parse_inverts_every_caption_in_every_template(task):
    for scene in all_scenes(task):
        for template in TEMPLATES:
            assert parse(template.format(scene.caption)) == scene


def test_parse_ignores_case_and_outer_space():
    assert parse("  A Photo of an Orange star\n") == parse("an orange star")


@pytest.mark.parametrize("prompt", ["", "a cat", "a star and a star", "a  red star"])
def test_parse_refuses_what_is_not_a_caption(prompt):
    with pytest.raises(ValueError, match="must be a caption of the world"):
        parse(prompt)


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_and_cover_the_task(task):
    train, held_out = split_scenes(task)
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(all_scenes(task))
    assert len(train) + len(held_out) == COUNTS[task]
    assert 0.2 * COUNTS[task] <= len(held_out) < 0.2 * COUNTS[task] + 2


@pytest.mark.parametrize(
    ("caption", "same", "other"),
    [
        ("a star and a cross", "a cross and a star", "a star and a heart"),
        ("a star above a cross", "a cross below a star", "a cross above a star"),
        ("a star left of a cross", "a cross right of a star", "a star right of a cross"),
        ("a red star and a blue cross", "a blue cross and a red star", "a blue star and a red cross"),
    ],
)
def test_captions_that_promise_the_same_are_on_one_side_of_the_split(caption: str, same: str, other: str):
    assert parse(caption).meaning == parse(same).meaning != parse(other).meaning
    for task in TASKS:
        train, held_out = split_scenes(task)
        assert not {s.meaning for s in train} & {s.meaning for s in held_out}
        assert len({s.meaning for s in train}) == len(train) / (2 if task in ("two", "position", "attribute") else 1)


def test_held_out_scenes_never_change():
    captions = [scene.caption for task in TASKS for scene in split_scenes(task)[1]]
    assert hashlib.sha256("\n".join(captions).encode()).hexdigest() == (
        "1ce7dc48ab1866dcb51ba4d6f2d4a8ba8af45d2551665ac1957caebed7a4eb06"
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("layout", "gap_px", "border_px"), [(place, 1, 0.5), (scatter, 2, 2)])
def test_layouts_keep_the_promise_and_nothing_touches(layout, gap_px, border_px, task):
    rng = np.random.default_rng(0)
    for scene in all_scenes(task)[:60]:
        placed = layout(scene, rng)
        assert [obj.shape for obj in placed] == [obj.shape for obj in scene.objects]
        assert all(obj.color in (None, seen.color) for obj, seen in zip(scene.objects, placed, strict=True))
        if task == "count":
            assert len({obj.color for obj in placed}) == 1
        if scene.relation:
            assert holds(scene.relation, *placed)
        for obj in placed:
            assert border_px <= min(obj.x_px, obj.y_px) - obj.radius_px
            assert max(obj.x_px, obj.y_px) + obj.radius_px <= 64 - border_px
        for a, b in itertools.combinations(placed, 2):
            assert math.dist((a.x_px, a.y_px), (b.x_px, b.y_px)) >= a.radius_px + b.radius_px + gap_px


def test_a_seed_is_a_picture():
    scene = parse("three hearts")
    first, again, other = (render(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
