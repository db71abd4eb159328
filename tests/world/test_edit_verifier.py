"""The verifier of edits: right on rendered pairs, and wrong wherever something else has changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards._edits import verdicts
from ngrpo_lora.world import EMBEDDED_EDIT
from ngrpo_lora.world.edit_verifier import Seen, look, promises, verify_edit
from ngrpo_lora.world.edits import EDIT_TASKS, Edit, Picture, all_edits, apply, choose_source, parse_edit
from ngrpo_lora.world.scenes import COLORS, SHAPES, Placed, choose_fill

Pair = tuple[Edit, Picture, Picture]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """240 edits with a source and what becomes of it, 60 of every task."""
    rng, made = np.random.default_rng(0), []
    for task in EDIT_TASKS:
        edits = all_edits(task)
        for edit in (edits[i] for i in rng.integers(len(edits), size=60)):
            source = choose_source(edit, rng)
            made.append((edit, source, apply(edit, source, rng)))
    return made


def judged(edit: Edit, source: Picture, picture: Picture | np.ndarray):
    pixels = picture.render() if isinstance(picture, Picture) else picture
    return verify_edit(pixels, look(source.render()), edit)


def test_what_was_edited_as_asked_is_accepted(pairs):
    verdicts = [judged(edit, source, after) for edit, source, after in pairs]
    assert all(verdict.strict for verdict in verdicts)
    assert min(verdict.graded for verdict in verdicts) > 0.9


def test_blur_of_a_decoder_is_forgiven(pairs):
    for edit, source, after in pairs[::6]:
        half = Image.fromarray(after.render()).resize((40, 40), Image.Resampling.BOX)
        assert judged(edit, source, np.asarray(half.resize((64, 64), Image.Resampling.BICUBIC))).strict


def test_what_the_models_own_vae_makes_of_a_right_picture_is_accepted(pairs):
    """No model in its latents can do better; a reward that refused it would be settled by the source alone."""
    vae: Any = AutoencoderKL.from_pretrained(EMBEDDED_EDIT, subfolder="vae", dtype=torch.float32)
    accepted = []
    for edit, source, after in pairs[::2]:
        pixels = torch.tensor(after.render()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].permute(1, 2, 0)
        again = ((decoded + 1) * 127.5).clamp(0, 255).round().byte().numpy()
        accepted.append(judged(edit, source, again).strict)
    assert np.mean(accepted) >= 0.95


def test_the_source_itself_is_no_edit(pairs):
    verdicts = [judged(edit, source, source) for edit, source, _ in pairs]
    assert not any(verdict.strict for verdict in verdicts)
    assert max(verdict.graded for verdict in verdicts) < 0.72


def test_another_picture_is_no_edit(pairs):
    for (edit, source, _), (_, _, other) in zip(pairs, pairs[1:] + pairs[:1], strict=True):
        if len(other.placed) != 1:  # two pictures of one object each can be alike
            assert not judged(edit, source, other).strict


def moved(picture: Picture, rng: np.random.Generator) -> Picture:
    first, *rest = picture.placed
    towards = 1 if first.x_px < 32 else -1
    return replace(picture, placed=(replace(first, x_px=first.x_px + 6 * towards), *rest))


def recoloured(picture: Picture, rng: np.random.Generator) -> Picture:
    color = next(color for color in COLORS if color != picture.placed[0].color)
    return replace(
        picture,
        placed=(replace(picture.placed[0], color=color), *picture.placed[1:]),
        fills=(choose_fill(color, rng), *picture.fills[1:]),
    )


def reshaped(picture: Picture, rng: np.random.Generator) -> Picture:
    shape = next(shape for shape in SHAPES if shape != picture.placed[0].shape)
    return replace(picture, placed=(replace(picture.placed[0], shape=shape), *picture.placed[1:]))


def shrunk(picture: Picture, rng: np.random.Generator) -> Picture:
    first = picture.placed[0]
    return replace(picture, placed=(replace(first, radius_px=0.7 * first.radius_px), *picture.placed[1:]))


def missing(picture: Picture, rng: np.random.Generator) -> Picture:
    return replace(picture, placed=picture.placed[1:], fills=picture.fills[1:])


def crowded(picture: Picture, rng: np.random.Generator) -> Picture:
    free = next(
        (x, y)
        for x in (16.0, 48.0)
        for y in (16.0, 48.0)
        if all(abs(obj.x_px - x) + abs(obj.y_px - y) > 16 for obj in picture.placed)
    )
    return replace(
        picture,
        placed=(*picture.placed, Placed("heart", "red", *free, radius_px=11.0)),
        fills=(*picture.fills, choose_fill("red", rng)),
    )


def darkened(picture: Picture, rng: np.random.Generator) -> Picture:
    return replace(picture, tint=picture.tint - 12.0)


@pytest.mark.parametrize("harm", [moved, recoloured, reshaped, shrunk, missing, crowded, darkened])
def test_harm_to_what_was_to_stay_is_refused_and_costs(harm, pairs):
    """An edit as asked, of which something that was in the source has changed as well."""
    rng = np.random.default_rng(1)
    seen = 0
    for edit, source, after in pairs:
        # The first object of a source is never the edited one where there are two or more.
        if len(source.placed) < 2 or len(after.placed) > 3:
            continue
        right, wrong = judged(edit, source, after), judged(edit, source, harm(after, rng))
        assert not wrong.strict, (edit.instruction, harm.__name__)
        assert wrong.graded < right.graded - 0.2
        seen += 1
    assert seen > 80


def test_an_added_object_may_stand_anywhere_free(pairs):
    for edit, source, _ in pairs:
        if edit.task == "add":
            places = {
                tuple(np.sign([after.placed[-1].x_px - 32, after.placed[-1].y_px - 32]))
                for after in (apply(edit, source, np.random.default_rng(seed)) for seed in range(20))
            }
            assert len(places) == 4 - len(source.placed)
            assert all(judged(edit, source, apply(edit, source, np.random.default_rng(s))).strict for s in range(5))
            return


def test_noise_is_worth_nothing(pairs):
    rng = np.random.default_rng(2)
    edit, source, _ = pairs[0]
    assert judged(edit, source, rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).graded < 0.05


def test_a_source_without_the_noun_is_told():
    source = choose_source(parse_edit("remove the red star"), np.random.default_rng(0))
    seen = look(source.render())
    with pytest.raises(
        ValueError, match="a source must show what 'remove the blue star' is to edit, but this one shows"
    ):
        promises(parse_edit("remove the blue star"), seen.found)
    with pytest.raises(ValueError, match="but this one shows no object"):
        promises(parse_edit("remove the star"), ())


def test_of_several_nouns_the_largest_is_meant():
    rng = np.random.default_rng(0)
    placed = (Placed("star", "red", 16, 16, 10.5), Placed("star", "blue", 48, 48, 13.5))
    fills = tuple(choose_fill(obj.color, rng) for obj in placed)
    source = Picture(np.array([230.0, 235, 240]), 8.0, placed, fills)
    edit = parse_edit("remove the star")
    kept, _ = (replace(source, placed=(obj,), fills=(fill,)) for obj, fill in zip(placed, fills, strict=True))
    assert judged(edit, source, kept).strict
    assert judged(parse_edit("remove the red star"), source, replace(source, placed=placed[1:], fills=fills[1:])).strict


def test_an_empty_picture_is_right_where_the_only_object_was_to_go():
    rng = np.random.default_rng(0)
    source = Picture(np.array([230.0, 235, 240]), 8.0, (Placed("star", "red", 16, 16, 12),), (choose_fill("red", rng),))
    verdict = judged(parse_edit("remove the star"), source, replace(source, placed=(), fills=()))
    assert verdict.strict
    assert verdict.graded > 0.95


def test_rewards_name_themselves_in_their_errors(pairs):
    edit, source, after = pairs[0]
    before, picture = Image.fromarray(source.render()), Image.fromarray(after.render())
    (verdict,) = verdicts("world_edit", [picture], [edit.instruction], [{"source": before}])
    assert verdict.strict
    with pytest.raises(UserError, match="reward world_edit needs the source picture of every prompt"):
        verdicts("world_edit", [picture], [edit.instruction], [{"source": "before.png"}])
    with pytest.raises(UserError, match="reward world_edit: a prompt must be an instruction of the world"):
        verdicts("world_edit", [picture], ["a red star"], [{"source": before}])


def test_a_source_without_background_is_read_as_one():
    seen = look(np.zeros((64, 64, 3), np.uint8))
    assert seen == Seen((), None)
