"""Intervals against closed forms and simulation, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from ngrpo_lora.evaluation.statistics import Estimate, compare_scores, mean_interval, share_interval

NAN = math.nan


def numbers(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


# Intervals ----------------------------------------------------------------------------------------------------------


def test_one_picture_per_prompt_gives_students_interval():
    values = np.random.default_rng(0).normal(3, 2, 17)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert numbers(mean_interval(values, range(17))) == pytest.approx([values.mean(), *expected], rel=1e-12)


def test_prompts_with_equally_many_pictures_give_students_interval_of_their_means():
    values = np.random.default_rng(1).normal(0, 1, (9, 4)) + np.arange(9)[:, None]
    means = values.mean(1)
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    found = mean_interval(values.ravel(), np.repeat(np.arange(9), 4).tolist())
    assert numbers(found) == pytest.approx([means.mean(), *expected], rel=1e-12)


def test_prompts_of_different_sizes_by_hand():
    # Mean 3; deviations add up to -3 and 3; shares 2/3 and 1/3, so T = 5/9 - 2/3 + 25/81 = 16/81, and se^2 =
    # (5/9) / (16/81) * (9 + 9) / 9 = 45/8; degrees of freedom (4/9)^2 / T = 1.
    half = math.sqrt(45 / 8) * math.tan(0.95 * math.pi / 2)
    assert numbers(mean_interval([1, 2, 6], "aab")) == pytest.approx([3, 3 - half, 3 + half], rel=1e-12)


def test_students_interval_agrees_with_a_bootstrap_of_prompts():
    rng = np.random.default_rng(2)
    values = rng.exponential(1, (150, 1)) + rng.normal(0, 0.3, (150, 3))
    found = mean_interval(values.ravel(), np.repeat(np.arange(150), 3).tolist())
    drawn = stats.bootstrap((values.mean(1),), np.mean, rng=np.random.default_rng(3)).confidence_interval
    assert [found.low, found.high] == pytest.approx(list(drawn), rel=0.04)


@pytest.mark.parametrize("wins", [0, 1, 7, 15, 20])
def test_one_pair_per_prompt_without_ties_gives_wilsons_interval(wins: int):
    expected = stats.binomtest(wins, 20).proportion_ci(0.95, method="wilson")
    found = share_interval([1.0] * wins + [0.0] * (20 - wins), range(20))
    assert numbers(found) == pytest.approx([wins / 20, *expected], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("interval", [mean_interval, share_interval])
def test_pictures_that_repeat_those_of_their_prompt_add_nothing(interval: Callable[..., Estimate]):
    values = [1.0, 0.0, 1.0, 1.0, 0.5, 1.0, 0.0, 1.0]
    once, thrice = interval(values, range(8)), interval(np.repeat(values, 3), np.repeat(range(8), 3).tolist())
    if interval is share_interval:  # where repeats count, ties would too: n is at most the number of pairs
        assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.05)
    else:
        assert numbers(thrice) == pytest.approx(numbers(once), rel=1e-12)


@pytest.mark.parametrize("interval", [mean_interval, share_interval])
def test_an_interval_holds_the_truth_as_often_as_it_says(interval: Callable[..., Estimate]):
    """Pictures of a prompt are alike: counted one by one they would hold it in about 70% of cases."""
    rng = np.random.default_rng(4)
    prompts = np.repeat(np.arange(30), 6)
    held = []
    for _ in range(500):
        easy = rng.beta(0.6, 0.4, 30)  # the chance of a win differs between prompts; its mean is 0.6
        found = interval(rng.binomial(1, easy[prompts]).astype(float), prompts.tolist())
        held.append(found.low <= 0.6 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.98


# How many of the 480 held-out prompts of the embedded world are of each of their 80 scenes.
SCENES = [41, 39, 28, 27, 25, 23, 21, 18, 18, 14, 13, 12, 11, 10, 10, 10, 8, 8, 8, 8, 7, 7, 6, 6, 6, 5, 5, 4, 4, 4]
SCENES += [3] * 4 + [2] * 16 + [1] * 30
VOTES = [9, 7, 5, 4, 4, 3, 3, 2, 2, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("spread", [1000.0, 3.0, 1.0])
@pytest.mark.parametrize("sizes", [SCENES, VOTES, [50] + [1] * 50], ids=["scenes", "votes", "one-large"])
@pytest.mark.parametrize("interval", [mean_interval, share_interval])
def test_groups_of_unequal_sizes_do_not_make_intervals_too_narrow(
    interval: Callable[..., Estimate], sizes: list[int], spread: float
):
    """Counted as so many equal groups they held the truth in 91%, 88% and 56% of cases, where groups differ most."""
    rng, groups = np.random.default_rng(6), np.repeat(np.arange(len(sizes)), sizes)
    held = []
    for _ in range(500):
        easy = rng.beta(0.6 * spread, 0.4 * spread, len(sizes))
        found = interval(rng.binomial(1, easy[groups]).astype(float), groups.tolist())
        held.append(found.low <= 0.6 <= found.high)
    assert np.mean(held) >= 0.9


@pytest.mark.parametrize("sizes", [SCENES, VOTES, [2, 1, 1]], ids=["scenes", "votes", "few"])
def test_the_standard_error_is_bell_and_mccaffreys(sizes: list[int]):
    """Against matrices: residual sums s = D M u of group means u, whose square is a quadratic form in them."""
    rng, groups = np.random.default_rng(7), np.repeat(np.arange(len(sizes)), sizes)
    values, counts = rng.normal(size=len(groups)), np.array(sizes, dtype=float)
    maker = counts[:, None] * (np.eye(len(sizes)) - counts / counts.sum())
    form, independent = maker.T @ maker, np.diag(1 / counts)
    squares = np.square(maker @ (np.bincount(groups, values) / counts)).sum()
    error = math.sqrt(np.square(counts).sum() / np.trace(form) * squares) / counts.sum()
    spread = form @ independent
    degrees = np.trace(spread) ** 2 / np.trace(spread @ spread)
    half = stats.t.ppf(0.975, degrees) * error
    found = mean_interval(values.tolist(), groups.tolist())
    assert numbers(found) == pytest.approx([values.mean(), values.mean() - half, values.mean() + half], rel=1e-9)


def test_every_pair_won_is_no_certainty():
    found = share_interval([1.0] * 12, [row // 4 for row in range(12)])
    assert found.value == 1
    assert found.high == 1
    assert found.low == pytest.approx(stats.binomtest(3, 3).proportion_ci(method="wilson").low, rel=1e-12)


def test_pictures_of_a_single_prompt_are_draws_of_their_own():
    values = [0.2, 0.5, 0.9, 0.4]
    assert mean_interval(values, ["a"] * 4) == mean_interval(values, range(4))
    assert share_interval([1.0, 0.0, 0.0, 1.0], ["a"] * 4) == share_interval([1.0, 0.0, 0.0, 1.0], range(4))


def test_what_failed_has_no_say_and_little_data_no_interval():
    assert mean_interval([1.0, NAN, 3.0, 8.0], "abcd") == mean_interval([1.0, 3.0, 8.0], "acd")
    assert numbers(mean_interval([2.0, NAN], "ab")) == pytest.approx([2, NAN, NAN], nan_ok=True)
    assert mean_interval([2.0, NAN], "ab").show() == "2.000"
    for interval in (mean_interval, share_interval):
        assert numbers(interval([NAN, NAN], "ab")) == pytest.approx([NAN] * 3, nan_ok=True)


# Differences --------------------------------------------------------------------------------------------------------


def test_differences_are_of_pairs_that_have_both_scores():
    before = {"r": [1.0, 2.0, 3.0, NAN, 5.0], "only_here": [0.0] * 5}
    after = {"r": [2.0, 2.0, 7.0, 9.0, NAN]}
    (found,) = compare_scores("new", after, "old", before, "abcde")
    assert (found.label, found.reference, found.reward, found.pairs, found.failed) == ("new", "old", "r", 3, 2)
    assert (found.before, found.after) == (2.0, pytest.approx(11 / 3))
    assert found.difference == mean_interval([1.0, 0.0, 4.0], "abc")
    assert found.win_rate == share_interval([1.0, 0.5, 1.0], "abc")
