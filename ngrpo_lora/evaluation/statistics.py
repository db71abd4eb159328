"""Means, shares and differences with confidence intervals, all of 95%.

Pictures of one prompt are alike, and so are those of prompts that mean the same, which therefore count as one draw:
standard errors are cluster-robust over them, and corrected for groups of unequal sizes, of which the large ones would
make intervals too narrow. Where all pictures are of one group, intervals are about this one, and every picture is a
draw.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ngrpo_lora.reports.tables import markdown_table

__all__ = ["Difference", "Estimate", "compare_scores", "differences_table", "mean_interval", "share_interval"]


Scores = dict[str, list[float]]
"""Scores by the reward's label: one per picture, NaN where the reward failed."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; the bounds are NaN where the data cannot give one."""

    value: float
    low: float
    high: float

    def show(self, form: str = ".3f") -> str:
        """Value and interval as text, as in `0.750 [0.700, 0.800]`."""
        bounds = "" if math.isnan(self.low) else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{bounds}"


def mean_interval(values: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """The mean and its t interval, with as many degrees of freedom as `_standard_error` has.

    Args:
        values: (N,); NaN is left out.
        groups: (N,); equal entries say which values are alike.
    """
    kept, numbers = _finite(values, groups)
    if not len(kept):
        return Estimate(math.nan, math.nan, math.nan)
    mean, half = float(kept.mean()), math.nan
    if numbers.max() > 0:
        error, degrees = _standard_error(kept, numbers)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    return Estimate(mean, mean - half, mean + half)


def share_interval(wins: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """The mean of wins (1), ties (0.5) and losses (0), and Wilson's interval for it.

    Wilson's n is the effective number of draws, p (1 - p) / se^2 (Kish 1965): at least the effective number of groups,
    1 / sum_g (N_g / N)^2, at most the number of draws, which it is when every group has one and there is no tie.

    Args:
        wins: (N,) in [0, 1]; NaN is left out.
        groups: (N,); equal entries say which draws are alike.
    """
    kept, numbers = _finite(wins, groups)
    if not len(kept):
        return Estimate(math.nan, math.nan, math.nan)
    share, count = float(kept.mean()), 1 / float(np.square(_sizes(numbers)).sum())
    variance, error = share * (1 - share), _standard_error(kept, numbers)[0] if numbers.max() > 0 else math.inf
    effective = min(max(variance / error**2, count), len(kept)) if error else len(kept) if variance else count
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    center = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * math.sqrt(variance / effective + z**2 / (4 * effective**2))
    return Estimate(share, max(0.0, center - half), min(1.0, center + half))


def _finite(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """The values that are not NaN, and their groups, numbered from 0; of a single group every value is one."""
    kept = [(value, group) for value, group in zip(values, groups, strict=True) if not math.isnan(value)]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(group for _, group in kept))}
    rows = [numbers[group] for _, group in kept] if len(numbers) > 1 else range(len(kept))
    return np.array([value for value, _ in kept]), np.array(rows, dtype=int)


def _standard_error(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Standard error of the mean, cluster-robust over two or more groups, and its degrees of freedom.

    With shares w_g = N_g / N of the values, and T = sum w^2 - 2 sum w^3 + (sum w^2)^2:

        se^2 = sum w^2 / T * sum_g (sum_{i in g} (x_i - mean))^2 / N^2     degrees = (1 - sum w^2)^2 / T

    The sum is Liang and Zeger's (1986). Before it is what makes it right on average where the values of a group are all
    the same; the degrees of freedom are Satterthwaite's for independent values (Bell and McCaffrey 2002). With G groups
    of one size these are G / (G - 1) and G - 1, and it is the standard error of the mean of their means.
    """
    shares, sums = _sizes(groups), np.bincount(groups, values - values.mean())
    square = np.square(shares).sum()
    spread = square - 2 * np.power(shares, 3).sum() + square**2
    error = math.sqrt(square / spread * np.square(sums).sum()) / len(values)
    return error, float((1 - square) ** 2 / spread)


def _sizes(groups: np.ndarray) -> np.ndarray:
    """Each group's share of all values."""
    return np.bincount(groups) / len(groups)


@dataclass(frozen=True)
class Difference:
    """Scores of pictures `label` against those of pictures `reference` of the same prompts and seeds, by one reward."""

    label: str
    reference: str
    reward: str
    before: float
    """Mean score of the reference, over the pairs that have both scores."""
    after: float
    difference: Estimate
    win_rate: Estimate
    """Share of the pairs in which `label` scores higher; a tie is half a win."""
    pairs: int
    failed: int


def compare_scores(
    label: str, scores: Scores, reference: str, reference_scores: Scores, groups: Sequence[Hashable]
) -> list[Difference]:
    """Compare scores in pairs, one difference per reward that both have; row i of both is the same prompt and seed.

    Args:
        groups: (N,) what the prompts mean (`world.meanings`); those that are equal count as one draw.
    """
    found = []
    for reward in (name for name in scores if name in reference_scores):
        before, after = np.array(reference_scores[reward]), np.array(scores[reward])
        valid = ~np.isnan(after - before)
        wins = np.where(valid, (after > before) + 0.5 * (after == before), math.nan)
        old, new = (float(column[valid].mean()) if valid.any() else math.nan for column in (before, after))
        difference, win_rate = mean_interval((after - before).tolist(), groups), share_interval(wins.tolist(), groups)
        pairs = int(valid.sum())
        found.append(Difference(label, reference, reward, old, new, difference, win_rate, pairs, len(valid) - pairs))
    return found


def differences_table(differences: Sequence[Difference]) -> str:
    """The differences as a Markdown table, one row for each."""
    rows = [
        (
            d.label,
            d.reference,
            d.reward,
            f"{d.before:.3f}",
            f"{d.after:.3f}",
            d.difference.show("+.3f"),
            d.win_rate.show(".0%"),
            d.pairs,
            d.failed,
        )
        for d in differences
    ]
    head = ("", "against", "reward", "before", "after", "difference (95% CI)", "win rate (95% CI)", "pairs", "failed")
    return markdown_table(head, rows)
