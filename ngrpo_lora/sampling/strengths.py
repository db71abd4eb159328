"""Strengths of an adapter that change from step to step, for samplers that know their noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ngrpo_lora.errors import ConfigError

__all__ = ["StrengthSchedule", "parse_schedule", "progress"]

EXAMPLE = "0:0, 0.3:1, 1:0.5"


@dataclass(frozen=True)
class StrengthSchedule:
    """A strength that is linear between points (place, strength), and constant before the first and after the last.

    Places are from 0, the first step, to 1, the last, and do not decrease. At a place that two points share the later
    one counts: a jump.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, place: float) -> float:
        """The strength at a place in [0, 1], by linear interpolation."""
        after = next((number for number, (at, _) in enumerate(self.points) if at > place), len(self.points))
        if after == 0:
            return self.points[0][1]
        if after == len(self.points):
            return self.points[-1][1]
        (start, low), (end, high) = self.points[after - 1], self.points[after]
        return low + (high - low) * (place - start) / (end - start)

    @property
    def constant(self) -> float | None:
        """The strength where it is the same at every step, else None."""
        strengths = {strength for _, strength in self.points}
        return strengths.pop() if len(strengths) == 1 else None


def parse_schedule(text: str) -> StrengthSchedule:
    """Read a schedule such as `0:0, 0.3:1, 1:0.5`, or one number for all steps; an empty text is 1.

    Raises:
        ConfigError: the text is no schedule, places outside [0, 1] or out of order, or a strength that is not finite.
    """
    text = text.strip() or "1"
    try:
        pairs = [part.split(":") for part in text.split(",")]
        if len(pairs) == 1 and len(pairs[0]) == 1:
            pairs = [["0", *pairs[0]]]
        points = tuple((float(place), float(strength)) for place, strength in pairs)
    except ValueError:
        raise ConfigError(f"schedule must be a number, or places with factors as in {EXAMPLE}, got {text!r}") from None
    places = [place for place, _ in points]
    if not all(0 <= place <= 1 for place in places) or places != sorted(places):
        raise ConfigError(f"places of a schedule must go up from 0, the first step, to 1, the last, got {text!r}")
    if not all(math.isfinite(strength) for _, strength in points):
        raise ConfigError(f"strengths of a schedule must be finite, got {text!r}")
    return StrengthSchedule(points)


def progress(sigma: float, sigmas: Sequence[float]) -> float:
    """Where a noise level stands in a sampling: 0 at its first step, 1 at its last, between two steps in proportion.

    Args:
        sigmas: (K + 1,) decreasing; step k starts at `sigmas[k]`.
    """
    last = len(sigmas) - 2
    if last < 1 or sigma >= sigmas[0]:
        return 0.0
    step = next((k for k in range(last) if sigmas[k + 1] <= sigma), last)
    if step == last:
        return 1.0
    return (step + (sigmas[step] - sigma) / (sigmas[step] - sigmas[step + 1])) / last
