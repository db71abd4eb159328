"""What pictures are worth by what was said of them: Plackett-Luce choices, of which Bradley-Terry's pairs are one kind.

An order is a list of tiers, best first, each a list of pictures: `[[2], [0, 1, 3], [5]]` says that 2 is better than all
others, 5 worse, and nothing of 0, 1 and 3 among themselves, nor of a picture 4. Each picture of a tier is a choice, it
above all lower tiers together:

    p(i chosen from S) = exp(u_i) / sum over j in S of exp(u_j)

Where every tier has one picture this is the Plackett-Luce likelihood of a ranking (Plackett 1975), and with two
pictures Bradley and Terry's of a pair (1952). What is worth most under a normal prior is returned, so that one vote has
a finite answer, and contradictory ones (a over b, b over c, c over a) cancel out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

__all__ = ["Choice", "Order", "agreement", "choices_of", "group_scores", "most_likely"]

Order = Sequence[Sequence[int]]
"""Tiers of pictures by number, best first."""


class Choice(NamedTuple):
    """One picture that was preferred to each of some others."""

    better: int
    worse: tuple[int, ...]


def choices_of(orders: Sequence[Order]) -> list[Choice]:
    """The choices that orders say, in their order."""
    return [
        Choice(picture, lower)
        for order in orders
        for place, tier in enumerate(order)
        if (lower := tuple(other for below in order[place + 1 :] for other in below))
        for picture in tier
    ]


def most_likely(
    choices: Sequence[Choice], features: np.ndarray, spread: float = 1.0, start: np.ndarray | None = None
) -> np.ndarray:
    """The weights that make the choices most likely, where a picture is worth `features @ weights`.

    Args:
        features: (N, D), a row a picture; the identity matrix gives each picture a worth of its own.
        spread: standard deviation of the normal prior of each weight.
        start: (D,), the prior's mean; None: 0.
    Returns:
        (D,) float64, where the posterior is greatest; it has one maximum, since its logarithm is concave.
    """
    mean = np.zeros(features.shape[1]) if start is None else np.asarray(start, dtype=np.float64)
    if not choices:
        return mean
    widest = 1 + max(len(choice.worse) for choice in choices)
    rows = np.array([[c.better, *c.worse, *[c.better] * (widest - 1 - len(c.worse))] for c in choices])  # (C, S)
    there = np.array([[place <= len(c.worse) for place in range(widest)] for c in choices])  # (C, S)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        worth = np.where(there, (features @ weights)[rows], -np.inf)  # (C, S)
        total = logsumexp(worth, axis=1, keepdims=True)  # (C, 1)
        pull = np.exp(worth - total)  # (C, S)
        pull[:, 0] -= 1
        slope = np.zeros(len(features))
        np.add.at(slope, rows, pull)
        offset = (weights - mean) / spread**2
        value = (total - worth[:, :1]).sum() + 0.5 * ((weights - mean) * offset).sum()
        return float(value), features.T @ slope + offset

    return minimize(loss, mean, jac=True, method="L-BFGS-B", options={"gtol": 1e-7, "ftol": 1e-13}).x


def group_scores(orders: Sequence[Order], count: int, expected: np.ndarray | None = None) -> np.ndarray:
    """What each of `count` pictures is worth by what was said of them.

    What was said of some pictures says nothing of others: those that stand in no order are NaN, and of orders without
    a picture in common, each has the mean 0.

    Args:
        expected: (count,), what the pictures are worth by a second judge, about which the first one's words move them;
            then none is NaN.
    Returns:
        (count,) float64, in units of Plackett and Luce's model: a difference of 1 is preferred 73 times of 100.
    """
    choices = choices_of(orders)
    scores = most_likely(choices, np.eye(count), start=expected)
    if expected is None:
        said = {number for choice in choices for number in (choice.better, *choice.worse)}
        scores[[number for number in range(count) if number not in said]] = np.nan
    return scores


def agreement(orders: Sequence[Order], worths: np.ndarray) -> float | None:
    """The share of said pairs that `worths` (count,) puts in the same order, equal ones as half; None without pairs."""
    pairs = [(choice.better, other) for choice in choices_of(orders) for other in choice.worse]
    if not pairs:
        return None
    better, worse = np.array(pairs).T
    return float(np.mean((np.sign(worths[better] - worths[worse]) + 1) / 2))
