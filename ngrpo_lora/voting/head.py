"""A small reward head: what a person is likely to prefer, learned from all votes so far.

The worth of a picture is linear in its features, and the weights are the most likely ones under the same model of
choices that a single group's scores are made of (`preferences.py`). It is measured on votes that it has not learned
from: each is predicted before it is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ngrpo_lora.voting.ballots import Ballot
from ngrpo_lora.voting.preferences import Choice, agreement, choices_of, most_likely

__all__ = ["Accuracy", "Features", "Head", "accuracy", "pixel_features"]

Features = Callable[[Sequence[Image.Image]], np.ndarray]
"""B images -> (B, D) numbers that say what they show."""

GRID, LEVELS = 8, 4
SPREAD = 2.0
"""Prior deviation of the worths of one group: of two pictures, one may well be preferred 20 times as often."""

RECENT = 50
"""Votes by which the head is judged: the last ones, as it knew less before them and the pictures were others."""
FEWEST = 15
"""Votes that must have been predicted before anything follows from how well they were."""


def pixel_features(images: Sequence[Image.Image]) -> np.ndarray:
    """B images -> (B, 256): colours on a grid of 8 x 8, and how often each of 4 x 4 x 4 colours occurs.

    They suffice for what small pictures of few objects show; of photographs, a CLIP knows more.
    """
    rows = []
    for image in images:
        rgb = image.convert("RGB")
        grid = np.asarray(rgb.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float64).ravel() / 255
        bins = np.asarray(rgb.resize((64, 64), Image.Resampling.NEAREST)).astype(int) * LEVELS // 256
        counts = np.bincount(np.dot(bins, [LEVELS**2, LEVELS, 1]).ravel(), minlength=LEVELS**3)
        rows.append(np.concatenate([grid / GRID, np.sqrt(counts / counts.sum())]))
    return np.stack(rows)


class Accuracy(NamedTuple):
    """How well votes were predicted before they were learned.

    count: how many of the last RECENT votes.
    share: mean share of the pairs said that were predicted as they were then said; NaN where count is 0.
    low: the lower end of its 95% interval.
    """

    count: int
    share: float
    low: float

    @property
    def is_better_than_chance(self) -> bool:
        """Whether so many votes were predicted that it was hardly by chance."""
        return self.count >= FEWEST and self.low > 0.5


def accuracy(ballots: Iterable[Ballot]) -> Accuracy:
    """Judge a head by what it had predicted of the last votes."""
    recent = [ballot.predicted for ballot in ballots if ballot.predicted is not None][-RECENT:]
    if not recent:
        return Accuracy(0, math.nan, math.nan)
    share, error = float(np.mean(recent)), float(np.std(recent)) / math.sqrt(len(recent))
    return Accuracy(len(recent), share, share - 1.96 * error)


class Head:
    """Predicts what is preferred within a group, once it has learned from a vote."""

    def __init__(self, features: Features):
        self.features = features
        self.known: dict[str, np.ndarray] = {}  # features of pictures by name
        self.weights: np.ndarray | None = None
        self.scale = 1.0

    def look(self, pictures: Sequence[str], images: Sequence[Image.Image]) -> None:
        """Compute the features of pictures, which `worths` and `learn` need, and keep them by the pictures' names."""
        if any(name not in self.known for name in pictures):
            self.known |= dict(zip(pictures, self.features(images), strict=True))

    def worths(self, pictures: Sequence[str]) -> np.ndarray | None:
        """What pictures that were looked at are worth, (N,), up to a constant of their prompt; None before a vote."""
        if self.weights is None:
            return None
        worths = self.valued(self.rows(pictures))
        return worths - worths.mean()

    def worths_of(self, images: Sequence[Image.Image]) -> np.ndarray:
        """What pictures are worth, (N,), up to a constant of their prompt; after a vote."""
        return self.valued(self.features(images))

    def valued(self, rows: np.ndarray) -> np.ndarray:
        """The worths of rows of features, (N, D) -> (N,)."""
        assert self.weights is not None
        return rows @ self.weights * self.scale

    def predicted(self, ballot: Ballot) -> float | None:
        """The share of the pairs said that the head has right; None where it knows nothing, or nothing was said."""
        worths = self.worths(ballot.pictures)
        return None if worths is None else agreement(ballot.orders, worths)

    def learn(self, ballots: Iterable[Ballot]) -> None:
        """Learn from all votes whose pictures were looked at; the weights depend on nothing else."""
        choices, tables, first = list[Choice](), list[np.ndarray](), 0
        for ballot in ballots:
            if ballot.said == "order" and all(name in self.known for name in ballot.pictures):
                table = self.rows(ballot.pictures)
                tables.append(table - table.mean(0))  # a prompt's own share is in no choice
                for better, worse in choices_of(ballot.orders):
                    choices.append(Choice(first + better, tuple(first + number for number in worse)))
                first += len(table)
        if not choices:
            self.weights = None
            return
        table = np.concatenate(tables)
        # Features of any size: the worths of one group have the prior deviation SPREAD.
        self.scale = 1 / max(float(np.sqrt(np.square(table).sum(1).mean())), 1e-12)
        self.weights = most_likely(choices, table * self.scale, SPREAD)

    def rows(self, pictures: Sequence[str]) -> np.ndarray:
        """The features of pictures, (N, D)."""
        return np.stack([self.known[name] for name in pictures]).astype(np.float64)
