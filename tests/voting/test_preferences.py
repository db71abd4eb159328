"""What pictures are worth: closed forms, what is not said, contradictions, and worths that are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import brentq

from ngrpo_lora.voting.preferences import Choice, agreement, choices_of, group_scores, most_likely


def log_posterior(worths: np.ndarray, order: list[int]) -> float:
    """Plackett and Luce's likelihood of a whole ranking, product by product, with a standard normal prior."""
    total = -0.5 * float(np.square(worths).sum())
    for place, picture in enumerate(order):
        total += worths[picture] - math.log(sum(math.exp(worths[other]) for other in order[place:]))
    return total


def test_choices_of_an_order_are_each_picture_above_all_lower_tiers():
    assert choices_of([[[2], [0, 1], [3]]]) == [Choice(2, (0, 1, 3)), Choice(0, (3,)), Choice(1, (3,))]
    assert choices_of([[[0, 1]], [[3], [2]]]) == [Choice(3, (2,))]


def test_one_pair_is_the_root_of_bradley_and_terrys_equation():
    """The slope of log sigmoid(2 u) - u^2 in u is 0 where u = 1 / (1 + exp(2 u))."""
    root = brentq(lambda u: 1 / (1 + math.exp(2 * u)) - u, 0, 1)
    np.testing.assert_allclose(group_scores([[[1], [0]]], 2), [-root, root], atol=1e-6)


def test_a_ranking_is_where_plackett_and_luces_posterior_is_greatest():
    order = [2, 0, 3, 1]
    found = group_scores([[[picture] for picture in order]], 4)
    assert [*np.argsort(-found)] == order
    assert found.sum() == pytest.approx(0, abs=1e-6)
    best = log_posterior(found, order)
    for number, step in itertools.product(range(4), (-0.01, 0.01)):
        moved = found.copy()
        moved[number] += step
        assert log_posterior(moved, order) < best


def test_what_was_not_said_is_masked_and_not_guessed():
    scores = group_scores([[[4], [1]]], 6)
    assert [*np.flatnonzero(np.isfinite(scores))] == [1, 4]
    assert np.isnan(group_scores([], 3)).all()
    apart = group_scores([[[0], [1]], [[2], [3]]], 4)
    np.testing.assert_allclose(apart, np.tile(group_scores([[[0], [1]]], 2), 2), atol=1e-6)


def test_nothing_is_said_among_pictures_of_one_tier():
    scores = group_scores([[[5], [0, 1, 2], [3]]], 6)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[1] == pytest.approx(scores[2], abs=1e-6)
    assert scores[5] > scores[0] > scores[3]
    assert np.isnan(scores[4])


def test_contradictions_cancel_out():
    circle = [[[0], [1]], [[1], [2]], [[2], [0]]]
    np.testing.assert_allclose(group_scores(circle, 3), 0, atol=1e-6)
    more = group_scores([*circle, [[0], [1]]], 3)
    assert more[0] > more[2] > more[1]


def test_a_second_judge_fills_in_what_was_not_said_and_is_moved_by_what_was():
    expected = np.array([1.0, 0.0, -1.0])
    scores = group_scores([[[2], [0]]], 3, expected)
    assert scores[1] == 0
    assert scores[2] - scores[0] > -2
    np.testing.assert_array_equal(group_scores([], 3, expected), expected)


def test_worths_are_found_again_from_rankings_drawn_by_them():
    generator, truth = np.random.default_rng(0), np.array([1.0, 0.3, 0.0, -0.4, -0.9])
    noisy = truth + generator.gumbel(size=(2000, 5))  # the ranking of these is Plackett and Luce's
    orders = [[[picture] for picture in np.argsort(-row)] for row in noisy]
    np.testing.assert_allclose(group_scores(orders, 5), truth - truth.mean(), atol=0.1)


def test_the_slope_that_the_optimizer_is_given_leads_to_the_maximum_over_features():
    generator = np.random.default_rng(1)
    features, choices = generator.normal(size=(6, 3)), [Choice(0, (1, 2, 3)), Choice(4, (5,)), Choice(1, (2,))]

    def value(weights: np.ndarray) -> float:
        worth = features @ weights
        said = sum(worth[b] - math.log(sum(math.exp(worth[n]) for n in (b, *w))) for b, w in choices)
        return said - 0.5 * float(np.square(weights).sum()) / 4

    found = most_likely(choices, features, spread=2.0)
    for direction in generator.normal(size=(20, 3)):
        assert value(found + 0.01 * direction) < value(found)


def test_agreement_counts_pairs_and_equal_worths_as_half():
    worths = np.array([2.0, 1.0, 1.0, np.inf])
    assert agreement([[[0], [1, 2]]], worths) == 1
    assert agreement([[[1], [0]], [[1], [2]]], worths) == 0.25
    assert agreement([], worths) is None
