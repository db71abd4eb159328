"""Several rewards added up, and how they correlate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from red_samples import NAN, tensor

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.scoring.combining import combine, correlations


def named(**weights: float) -> list[RewardConfig]:
    return [RewardConfig(name="world", label=label, weight=weight) for label, weight in weights.items()]


@pytest.mark.parametrize("how", ["standardized", "raw"])
def test_a_single_reward_stays_raw_times_its_weight(how: Any):
    raw = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 9.0]], dtype=torch.float64)
    batch = combine({"a": raw}, named(a=-2), how)
    assert torch.equal(batch.rewards, -2 * raw)
    assert batch.valid.all()
    assert torch.equal(batch.scores["a"], raw)


def test_several_rewards_are_standardised_in_their_group_then_weighted():
    """Scale and offset of a reward do not matter, its weight does."""
    a, b = torch.rand(4, 6, dtype=torch.float64), 1000 + 500 * torch.rand(4, 6, dtype=torch.float64)
    batch = combine({"a": a, "b": b}, named(a=1, b=-0.5))
    za, zb = ((x - x.mean(1, True)) / x.std(1, correction=0, keepdim=True) for x in (a, b))
    torch.testing.assert_close(batch.rewards, za - 0.5 * zb)
    assert batch.valid.all()


def test_a_raw_sum_keeps_each_rewards_scale():
    a, b = torch.rand(4, 6, dtype=torch.float64), 1000 + 500 * torch.rand(4, 6, dtype=torch.float64)
    torch.testing.assert_close(combine({"a": a, "b": b}, named(a=1, b=-0.5), "raw").rewards, a - 0.5 * b)


def test_a_clip_holds_scores_before_they_are_added_up_and_leaves_the_record():
    a, b = tensor(0.0, 1.0, 50.0)[None], tensor(3.0, 2.0, 1.0)[None]
    first, second = named(a=1, b=1)
    first = first.model_copy(update={"clip": (0.5, 2.0)})
    batch = combine({"a": a, "b": b}, [first, second], "raw")
    assert batch.rewards.tolist() == [[3.5, 3.0, 3.0]]
    assert torch.equal(batch.scores["a"], a)
    assert combine({"a": a}, [first]).rewards.tolist() == [[0.5, 1.0, 2.0]]


def test_a_reward_that_is_equal_all_over_a_group_adds_0():
    a, b = torch.tensor([[97.1] * 7]).double(), torch.rand(1, 7, dtype=torch.float64)
    with_flat = combine({"a": a, "b": b}, named(a=1, b=1))
    torch.testing.assert_close(with_flat.rewards, (b - b.mean()) / b.std(correction=0), rtol=1e-9, atol=1e-9)


def test_a_reward_on_a_tiny_scale_counts_as_any_other():
    a, b = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    tiny, plain = (combine({"a": scale * a, "b": b}, named(a=1, b=1)).rewards for scale in (1e-12, 1.0))
    torch.testing.assert_close(tiny, plain)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, (0.0, 10.0)])
def test_a_score_that_is_not_finite_masks_its_sample_in_every_reward(bad: float, clip: tuple[float, float] | None):
    a = torch.tensor([[1.0, 2.0, 3.0, bad], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    b = torch.tensor([[5.0, bad, 6.0, 9.0], [7.0, 7.5, 8.0, 9.0]], dtype=torch.float64)
    weighted = [config.model_copy(update={"clip": clip}) for config in named(a=1, b=2)]
    batch = combine({"a": a, "b": b}, weighted)
    assert batch.valid.tolist() == [[True, False, True, False], [True] * 4]
    # Of the first group 1 and 3, 5 and 6 are left: each standardised to -1 and 1.
    torch.testing.assert_close(batch.rewards[0, [0, 2]], tensor(-3, 3))
    alone = combine({"a": a[1:], "b": b[1:]}, weighted)
    assert torch.equal(batch.rewards[1:], alone.rewards)
    assert batch.rewards.isfinite().all()


def test_a_failed_score_of_a_single_reward_is_masked_not_a_number():
    batch = combine({"a": torch.tensor([[1.0, NAN], [NAN, NAN]]).double()}, named(a=1))
    assert batch.valid.tolist() == [[True, False], [False, False]]
    assert batch.rewards.isfinite().all()


# Correlation --------------------------------------------------------------------------------------------------------


def test_correlation_is_pearsons_within_groups():
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    b[0, 2] = NAN
    kept = [(a[g, ~b[g].isnan()], b[g, ~b[g].isnan()]) for g in range(3)]
    x, y = (torch.cat([part - part.mean() for part in parts]) for parts in zip(*kept, strict=True))
    expected = np.corrcoef(x.numpy(), y.numpy())[0, 1]
    offsets = tensor(0, 100, -100)[:, None]  # between groups both differ alike, which must not count
    assert correlations({"a": a + offsets, "b": b + offsets}) == {"a~b": pytest.approx(expected)}


def test_correlation_of_opposites_is_minus_1_and_of_a_constant_is_none():
    a = torch.randn(2, 5, dtype=torch.float64)
    found = correlations({"a": a, "b": -3 * a + 7, "c": torch.full_like(a, 97.1)})
    assert found["a~b"] == pytest.approx(-1)
    assert math.isnan(found["a~c"])
    assert list(found) == ["a~b", "a~c", "b~c"]
