"""Rewards by name, what they may return, and how several are added up."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ngrpo_lora import rewards
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.world import scenes

IMAGES = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 100, 200)]
PROMPTS = ["a", "b", "c"]
NAN = math.nan


# Look-up ------------------------------------------------------------------------------------------------------------


def test_a_reward_is_a_file_of_the_package_or_a_function_anywhere(tmp_path: Path):
    own = tmp_path / "mine.py"
    own.write_text("def count(images, prompts, metadata):\n    return [7.0] * len(images)\n")
    assert rewards.load("world").__module__ == "ngrpo_lora.rewards.world"
    assert rewards.load("ngrpo_lora.rewards.world_strict:score").__module__ == "ngrpo_lora.rewards.world_strict"
    assert rewards.load(f"{own}:count")(IMAGES, PROMPTS, []) == [7.0] * 3


def test_an_unknown_reward_names_the_nearest(tmp_path: Path):
    with pytest.raises(ConfigError, match="got 'wrld'; did you mean world"):
        rewards.load("wrld")
    own = tmp_path / "mine.py"
    own.write_text("def count(images, prompts, metadata): ...\n")
    with pytest.raises(ConfigError, match="got 'cuont'; did you mean count"):
        rewards.load(f"{own}:cuont")


@pytest.mark.parametrize("name", ["world", "world_strict"])
def test_the_worlds_rewards_are_1_for_what_the_caption_says(name: str):
    scene, other = scenes.parse("a red star"), "a photo of a blue circle"
    image = Image.fromarray(scenes.render(scene, np.random.default_rng(0)))
    right, wrong = rewards.call(name, rewards.load(name), [image, image], ["a red star", other]).tolist()
    assert right == pytest.approx(1, abs=0.1)
    assert wrong < 0.6


# Call ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, NAN],
        (1.0, 2.5, NAN),
        np.array([1, 2.5, NAN], dtype=np.float32),
        torch.tensor([1, 2.5, NAN]),
        torch.tensor([1, 2.5, NAN], requires_grad=True),
        [torch.tensor(1.0), np.float64(2.5), NAN],
    ],
    ids=["list", "tuple", "array", "tensor", "tensor_with_gradient", "mixed"],
)
def test_numbers_of_any_kind_become_float64(returned: object):
    scores = rewards.call("r", lambda images, prompts, metadata: returned, IMAGES, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor([1, 2.5, NAN], dtype=torch.float64), equal_nan=True, rtol=0, atol=0)
    assert not scores.requires_grad


@pytest.mark.parametrize(
    "returned",
    [[1.0, 2.0], [1.0] * 4, 1.0, None, ["good"] * 3, [[1.0]] * 3, torch.zeros(3, 1), [None] * 3, {"a": 1}],
    ids=["short", "long", "scalar", "none", "words", "nested", "column", "nones", "dictionary"],
)
def test_anything_but_one_number_an_image_is_an_error_that_shows_it(returned: object):
    with pytest.raises(UserError, match="reward mine must return 3 numbers for 3 images, got "):
        rewards.call("mine", lambda images, prompts, metadata: returned, IMAGES, PROMPTS)


def test_a_reward_that_raises_masks_its_images_and_is_logged(caplog: pytest.LogCaptureFixture):
    def broken(images, prompts, metadata):
        raise RuntimeError("no such judge")

    with caplog.at_level(logging.ERROR, "ngrpo_lora.rewards"):
        scores = rewards.call("broken", broken, IMAGES, PROMPTS)
    assert scores.shape == (3,)
    assert scores.isnan().all()
    assert "reward broken raised; its 3 images are masked" in caplog.text
    assert "no such judge" in caplog.text


def test_a_reward_sees_images_prompts_and_a_dictionary_for_each():
    seen = {}

    def spy(images, prompts, metadata):
        seen.update(images=images, prompts=prompts, metadata=metadata)
        return [0.0] * len(images)

    rewards.call("spy", spy, IMAGES, PROMPTS)
    assert seen["images"] == IMAGES
    assert seen["prompts"] == PROMPTS
    assert seen["metadata"] == [{}, {}, {}]
    assert len({id(entry) for entry in seen["metadata"]}) == 3


# Combine ------------------------------------------------------------------------------------------------------------


def test_a_single_reward_stays_raw_times_its_weight():
    raw = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 9.0]], dtype=torch.float64)
    batch = rewards.combine({"a": raw}, {"a": -2.0})
    assert torch.equal(batch.rewards, -2 * raw)
    assert batch.valid.all()
    assert torch.equal(batch.scores["a"], raw)


def test_several_rewards_are_standardised_in_their_group_then_weighted():
    """Scale and offset of a reward do not matter, its weight does."""
    a, b = torch.rand(4, 6, dtype=torch.float64), 1000 + 500 * torch.rand(4, 6, dtype=torch.float64)
    batch = rewards.combine({"a": a, "b": b}, {"a": 1.0, "b": -0.5})
    za, zb = ((x - x.mean(1, True)) / x.std(1, correction=0, keepdim=True) for x in (a, b))
    torch.testing.assert_close(batch.rewards, za - 0.5 * zb)
    assert batch.valid.all()


def test_a_reward_that_is_equal_all_over_a_group_adds_0():
    a, b = torch.tensor([[97.1] * 7]).double(), torch.rand(1, 7, dtype=torch.float64)
    with_flat = rewards.combine({"a": a, "b": b}, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(with_flat.rewards, (b - b.mean()) / b.std(correction=0), rtol=1e-9, atol=1e-9)


def test_a_reward_on_a_tiny_scale_counts_as_any_other():
    a, b = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    tiny, plain = (rewards.combine({"a": scale * a, "b": b}, {"a": 1.0, "b": 1.0}).rewards for scale in (1e-12, 1.0))
    torch.testing.assert_close(tiny, plain)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_score_that_is_not_finite_masks_its_sample_in_every_reward(bad: float):
    a = torch.tensor([[1.0, 2.0, 3.0, bad], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    b = torch.tensor([[5.0, bad, 6.0, 9.0], [7.0, 7.5, 8.0, 9.0]], dtype=torch.float64)
    batch = rewards.combine({"a": a, "b": b}, {"a": 1.0, "b": 2.0})
    assert batch.valid.tolist() == [[True, False, True, False], [True] * 4]
    # Of the first group 1 and 3, 5 and 6 are left: each standardised to -1 and 1.
    torch.testing.assert_close(batch.rewards[0, [0, 2]], torch.tensor([-3.0, 3.0]).double())
    alone = rewards.combine({"a": a[1:], "b": b[1:]}, {"a": 1.0, "b": 2.0})
    assert torch.equal(batch.rewards[1:], alone.rewards)
    assert batch.rewards.isfinite().all()


def test_a_failed_score_of_a_single_reward_is_masked_not_a_number():
    batch = rewards.combine({"a": torch.tensor([[1.0, NAN], [NAN, NAN]]).double()}, {"a": 1.0})
    assert batch.valid.tolist() == [[True, False], [False, False]]
    assert batch.rewards.isfinite().all()
