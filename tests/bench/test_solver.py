"""The solver's errors, on a flow whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from ngrpo_lora.bench import solver


def test_the_known_answer_solves_the_ode():
    """Its points keep their place in the distribution, move with the velocity, and begin standard normal."""
    noise = solver.NOISE
    torch.testing.assert_close(solver.cumulative(noise, 1.0), torch.special.ndtr(noise))
    for sigma in (0.9, 0.5, 0.1):
        at = solver.solve(noise, 1.0, sigma)
        later, earlier = (solver.solve(noise, 1.0, sigma + h) for h in (1e-5, -1e-5))
        torch.testing.assert_close((later - earlier) / 2e-5, solver.velocity(at, sigma), rtol=1e-6, atol=1e-8)


def slopes(counts: list[int], errors: list[float]) -> list[float]:
    return [math.log(a / b, n / m) for m, n, a, b in zip(counts, counts[1:], errors, errors[1:], strict=False)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_is_of_second_order_inside_and_up_to_a_logarithm_from_noise_to_data(shift: float):
    counts = [64, 128, 256, 512, 1024]
    errors = [solver.measure(count, shift) for count in counts]
    assert all(1.9 <= slope <= 2.2 for slope in slopes(counts, [e.inside for e in errors]))
    assert all(0.97 <= slope <= 1.03 for slope in slopes(counts, [e.euler for e in errors]))
    # log(K) / K^2: what is left without the logarithm nears slope 2; with it 1.9 needs ten thousands of steps
    whole = slopes(counts, [e.whole / math.log(e.num_steps) for e in errors])
    assert whole == sorted(whole)
    assert 1.85 < whole[-1] < 2.05
    assert 1.7 < slopes(counts, [e.whole for e in errors])[-1] < 1.9


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_few_steps_beat_eulers_and_integer_timesteps_stop_to_converge(shift: float):
    for count in (4, 8, 16):
        errors = solver.measure(count, shift)
        assert errors.whole < errors.euler
        assert errors.exact == pytest.approx(errors.whole, rel=0.25)  # by their own levels, from 0.999
    errors = solver.measure(1024, shift)
    assert errors.exact < 1e-4 < 1e-3 < errors.integer


def test_the_table_has_a_slope_for_every_step_but_the_first():
    lines: list[str] = []
    solver.solver_table([8, 4], [3.0], lines.append)
    four, eight = (solver.measure(count, 3.0) for count in (4, 8))
    assert lines[-2].startswith(f"| 4 | {four.inside:.2e} | {four.whole:.2e} | ")
    slope = math.log2(four.whole / eight.whole)
    assert f"| {eight.whole:.2e} ({slope:.2f}) |" in lines[-1]
