"""Strengths over the steps: what a text means, and where a noise level stands."""

from __future__ import annotations

import pytest

from ngrpo_lora.equations.solvers import flow_sigmas
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.sampling.strengths import parse_schedule, progress


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", [1, 1, 1, 1, 1]),
        ("0.4", [0.4] * 5),
        ("0:0, 1:1", [0, 0.25, 0.5, 0.75, 1]),
        ("0:0, 0.5:1, 1:0.5", [0, 0.5, 1, 0.75, 0.5]),
        ("0.25:1, 0.75:3", [1, 1, 2, 3, 3]),
        ("0:1, 0.5:1, 0.5:0, 1:0", [1, 1, 0, 0, 0]),
        (" 0 : -1 ,1: 1 ", [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_lines_between_points(text: str, values: list[float]):
    schedule = parse_schedule(text)
    assert [schedule(place) for place in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(values)
    assert schedule.constant == (values[0] if len({*values}) == 1 else None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fast", "schedule must be a number, or places with factors as in 0:0, 0.3:1, 1:0.5, got 'fast'"),
        ("0:0, 1", "schedule must be a number, or places"),
        ("0.5, 1", "schedule must be a number, or places"),
        ("0:1:2", "schedule must be a number, or places"),
        ("0:1,", "schedule must be a number, or places"),
        ("0:0, 1.2:1", "places of a schedule must go up from 0"),
        ("-0.1:0", "places of a schedule must go up from 0"),
        ("0.5:0, 0.2:1", "places of a schedule must go up from 0"),
        ("nan:1", "places of a schedule must go up from 0"),
        ("0:inf", "strengths of a schedule must be finite"),
        ("nan", "strengths of a schedule must be finite"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, reason: str):
    with pytest.raises(ConfigError) as refused:
        parse_schedule(text)
    assert reason in str(refused.value)


@pytest.mark.parametrize("steps", [2, 8])
def test_steps_are_equally_far_apart_whatever_their_noise_levels(steps: int):
    sigmas = flow_sigmas(steps, 3.0).tolist()
    assert [progress(sigma, sigmas) for sigma in sigmas[:-1]] == [k / (steps - 1) for k in range(steps)]
    assert progress((sigmas[0] + sigmas[1]) / 2, sigmas) == pytest.approx(0.5 / (steps - 1))
    assert progress(0.0, sigmas) == 1
    assert progress(2.0, sigmas) == 0


def test_a_single_step_is_the_first():
    assert progress(1.0, [1.0, 0.0]) == 0
