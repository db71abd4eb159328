"""Edits of the embedded world: their instructions, their splits, and pictures before and after."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from ngrpo_lora.world.edits import (
    EDIT_TASKS,
    Edit,
    Picture,
    all_edits,
    apply,
    choose_source,
    parse_edit,
    quarter,
    split_edits,
)
from ngrpo_lora.world.scenes import Object, Placed

COUNTS = {"recolor": 216, "replace": 210, "remove": 42, "add": 42}


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_parse_inverts_every_instruction(task):
    edits = all_edits(task)
    assert len(edits) == COUNTS[task]
    for edit in edits:
        assert parse_edit(f"  {edit.instruction.upper()}\n") == edit


@pytest.mark.parametrize(
    ("edit", "instruction"),
    [
        (Edit("recolor", Object("star"), "blue"), "make the star blue"),
        (Edit("replace", Object("star", "red"), "heart"), "turn the red star into a heart"),
        (Edit("remove", Object("circle", "orange")), "remove the orange circle"),
        (Edit("add", Object("circle", "orange")), "add an orange circle"),
    ],
)
def test_instructions_are_plain_english(edit: Edit, instruction: str):
    assert edit.instruction == instruction


@pytest.mark.parametrize("prompt", ["", "a red star", "make the star", "make the blue star blue", "remove a star"])
def test_parse_refuses_what_is_no_instruction(prompt):
    with pytest.raises(ValueError, match="must be an instruction of the world"):
        parse_edit(prompt)


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_splits_cover_a_task_and_share_no_meaning(task):
    train, held_out = split_edits(task)
    assert {*train, *held_out} == {*all_edits(task)}
    assert not {edit.meaning for edit in train} & {edit.meaning for edit in held_out}
    assert 0.15 < len(held_out) / COUNTS[task] < 0.35


def test_which_colour_tells_the_object_does_not_change_the_meaning_but_of_what_is_added_it_does():
    assert parse_edit("make the red star blue").meaning == parse_edit("make the star blue").meaning
    assert parse_edit("add a red star").meaning != parse_edit("add a star").meaning


def test_held_out_edits_never_change():
    instructions = [edit.instruction for task in EDIT_TASKS for edit in split_edits(task)[1]]
    digest = hashlib.sha256("\n".join(instructions).encode()).hexdigest()
    assert digest == "ed476d4e5b27fd02166fa88718bf3f641b7cfaebd5ed45a86838d50a13db4e5a"


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_an_edit_changes_what_it_names_and_nothing_else(task):
    rng = np.random.default_rng(7)
    for edit in all_edits(task):
        source = choose_source(edit, rng)
        after = apply(edit, source, rng)
        assert (after.tint is source.tint, after.shade) == (True, source.shade)
        before_by_place, after_by_place = by_place(source), by_place(after)
        assert len(before_by_place) == len(source.placed) <= 3
        assert len({obj.shape for obj in source.placed}) == len(source.placed)  # so that `the star` is one of them
        changed = {
            place
            for place in before_by_place.keys() | after_by_place.keys()
            if before_by_place.get(place) != after_by_place.get(place)
        }
        (place,) = changed
        old, new = before_by_place.get(place), after_by_place.get(place)
        if task == "add":
            assert old is None
            assert new is not None
            assert new[0].shape == edit.noun.shape
            assert edit.noun.color in (None, new[0].color)
            continue
        assert old is not None
        assert old[0].shape == edit.noun.shape
        assert edit.noun.color in (None, old[0].color)
        if task == "remove":
            assert new is None
            assert after.placed
            continue
        assert new is not None
        assert (new[0].x_px, new[0].y_px, new[0].radius_px) == (old[0].x_px, old[0].y_px, old[0].radius_px)
        if task == "recolor":
            assert (new[0].shape, new[0].color) == (old[0].shape, edit.to)
            assert old[0].color != edit.to
        else:
            assert (new[0].shape, new[0].color, new[1]) == (edit.to, old[0].color, old[1])


def by_place(picture: Picture) -> dict[tuple[bool, bool], tuple[Placed, list[float]]]:
    return {quarter(obj): (obj, fill) for obj, fill in zip(picture.placed, picture.fills, strict=True)}


def test_pixels_change_only_where_the_edit_is():
    rng = np.random.default_rng(3)
    edit = parse_edit("make the star blue")
    source = choose_source(edit, rng)
    before, after = source.render(), apply(edit, source, rng).render()
    (star,) = (obj for obj in source.placed if obj.shape == "star")
    rows, columns = np.nonzero((before != after).any(2))
    assert np.hypot(columns - star.x_px, rows - star.y_px).max() < star.radius_px + 2
    assert len(rows) > 80


def test_a_seed_is_a_pair_of_pictures():
    edit = parse_edit("add a heart")

    def pair(seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        source = choose_source(edit, rng)
        return [source.render(), apply(edit, source, rng).render()]

    np.testing.assert_array_equal(pair(5), pair(5))
    assert not np.array_equal(pair(5), pair(6))
