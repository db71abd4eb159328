"""What it takes to reach a held-out reward: forward passes and seconds until each method's curve first crosses it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from ngrpo_lora.bench.paper.outcomes import Outcome

__all__ = ["ABOUT", "GAINS", "costs", "crossing"]

GAINS = (0.02, 0.04, 0.06, 0.08)
"""Gains in held-out reward over the base model whose cost is told."""


ABOUT = (
    "Forward passes per sample and seconds of training until the held-out reward, on straight lines between "
    "evaluations, is first above the base model's by so much. Means over the seeds that reach it. A curve that wavers "
    "crosses early: the tables before say where it ends."
)


def costs(outcomes: Sequence[Outcome]) -> list[str]:
    """What each gain over the base cost a method, as text, of its runs with several seeds."""
    found = [[crossing(outcome, gain) for outcome in outcomes] for gain in GAINS]
    return [in_words([place for place in places if place is not None], len(outcomes)) for places in found]


def in_words(places: Sequence[tuple[float, float]], seeds: int) -> str:
    """The means of forward passes and seconds, and how many seeds they are of, where that is not all."""
    if not places:
        return "not reached"
    passes, seconds = (fmean(column) for column in zip(*places, strict=True))
    some = "" if len(places) == seeds else f", {len(places)} of {seeds} seeds"
    return f"{passes:.0f} ({seconds:.0f} s{some})"


def crossing(outcome: Outcome, gain: float) -> tuple[float, float] | None:
    """Forward passes per sample and seconds until the reward is above the base's by `gain`; None where it never is."""
    curve = [(step, float(np.nanmean(outcome.rewards(step)))) for step in sorted(outcome.scores)]
    wanted = curve[0][1] + gain
    for (before, low), (after, high) in zip(curve, curve[1:], strict=False):
        if low < wanted <= high:
            share = (wanted - low) / (high - low)
            spent, seconds = outcome.spent(), outcome.seconds()
            passes, duration = (c[before] + share * (c[after] - c[before]) for c in (spent, seconds))
            return passes, duration
    return None
