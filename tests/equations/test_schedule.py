"""A rest of a schedule that is solved in other steps."""

from __future__ import annotations

import pytest
import torch

from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import flow_sigmas


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_rest_of_as_many_steps_is_what_was_left(step: int, shift: float):
    sigmas = flow_sigmas(8, shift)
    schedule = Schedule(sigmas, shift)
    assert schedule.num_steps == 8
    torch.testing.assert_close(schedule.rest(step, 8 - step), sigmas[step:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.158])
@pytest.mark.parametrize(("step", "num_steps"), [(0, 3), (1, 1), (3, 2), (5, 40)])
def test_a_rest_starts_at_the_very_level_and_falls_to_0(step: int, num_steps: int, shift: float):
    sigmas = flow_sigmas(6, shift)
    rest = Schedule(sigmas, shift).rest(step, num_steps)
    assert (len(rest), rest.dtype) == (num_steps + 1, torch.float32)
    assert rest[0] == sigmas[step]
    assert rest[-1] == 0
    assert (rest.diff() < 0).all()


def test_a_rest_is_evenly_spaced_before_the_shift():
    """From 3/4 at shift 3, which is 1/2 before it, in two steps: 1/4 before the shift is 1/2 after it."""
    schedule = Schedule(torch.tensor([1.0, 0.75, 0.0]), 3.0)
    torch.testing.assert_close(schedule.rest(1, 2), torch.tensor([0.75, 0.5, 0.0]))


@pytest.mark.parametrize(("step", "num_steps"), [(-1, 2), (8, 1), (9, 1), (2, 0), (0, -3)])
def test_a_step_that_is_not_there_and_a_rest_of_no_steps_are_errors(step: int, num_steps: int):
    with pytest.raises(
        ValueError, match=f"step must be from 0 to 7 and num_steps at least 1, got {step} and {num_steps}"
    ):
        Schedule(flow_sigmas(8, 3.0), 3.0).rest(step, num_steps)
