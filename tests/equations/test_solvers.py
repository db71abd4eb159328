"""Solvers against flows whose solution is known, and against diffusers' own DPM-Solver++."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ngrpo_lora import dpmpp_2m, dpmpp_2m_step, euler, flow_sigmas
from ngrpo_lora.equations.solvers import SOLVERS

Solver = Callable[..., list[Tensor]]

MEAN, STD = 0.7, 0.4


def gaussian_velocity(x: Tensor, sigma: float) -> Tensor:
    """E[noise - clean | x] of the flow whose data are N(MEAN, STD^2)."""
    variance = ((1 - sigma) * STD) ** 2 + sigma**2
    offset = x - (1 - sigma) * MEAN
    return offset * sigma / variance - (MEAN + offset * (1 - sigma) * STD**2 / variance)


def gaussian_solution(noise: Tensor, sigma: float) -> Tensor:
    """Where that flow takes `noise`: `mean + std * noise`, as all marginals are Gaussian."""
    return (1 - sigma) * MEAN + math.sqrt(((1 - sigma) * STD) ** 2 + sigma**2) * noise


def error(solver: Solver, num_steps: int, shift: float, share: float = 1.0) -> float:
    """Largest error after the first `share` of the steps, from sigma exactly 1."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    sigmas = flow_sigmas(num_steps, shift).double()[: round(share * num_steps) + 1]
    end = solver(gaussian_velocity, noise, sigmas)[-1]
    return (end - gaussian_solution(noise, sigmas[-1].item())).abs().max().item()


# Sigmas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(1.15), 0.5])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 8, 50])
def test_flow_sigmas_end_exactly_at_1_and_0_and_decrease(num_steps: int, shift: float):
    sigmas = flow_sigmas(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas[0].item() == 1.0
    assert sigmas[-1].item() == 0.0
    assert (sigmas.diff() < 0).all()


def test_flow_sigmas_closed_form():
    torch.testing.assert_close(flow_sigmas(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]), rtol=0, atol=0)
    torch.testing.assert_close(flow_sigmas(4, 3.0), torch.tensor([1, 9 / 10, 3 / 4, 1 / 2, 0]))


def test_a_shift_is_a_shift_of_the_log_snr():
    """Shift s divides the signal-to-noise ratio (1 - sigma) / sigma by s everywhere."""
    plain, shifted = flow_sigmas(8)[1:-1], flow_sigmas(8, 3.0)[1:-1]
    torch.testing.assert_close((1 - shifted) / shifted, (1 - plain) / plain / 3)


@pytest.mark.parametrize(
    ("num_steps", "shift"), [(0, 1.0), (-1, 1.0), (4, 0.0), (4, -2.0), (4, math.nan), (4, math.inf)]
)
def test_flow_sigmas_refuses(num_steps: int, shift: float):
    message = f"num_steps must be >= 1 and shift > 0 and finite, got {num_steps} and {shift}"
    with pytest.raises(ValueError, match=message):
        flow_sigmas(num_steps, shift)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(
    "sigmas", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0, 0.2, 0.3, 0.0], [1.1, 0.0], [1.0, -0.1], [[1.0, 0.0]]]
)
def test_sigmas_that_do_not_decrease_within_0_and_1_are_an_error(solver: Solver, sigmas: list[float]):
    with pytest.raises(ValueError, match="sigmas must"):
        solver(gaussian_velocity, torch.zeros(2), torch.tensor(sigmas))


# Exact cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_k_steps_give_k_plus_1_latents_and_ask_the_model_k_times_at_the_very_sigmas(solver: Solver):
    latents, sigmas, asked = torch.randn(2, 4, 8, 8), flow_sigmas(5, 3.0), []

    def velocity_fn(x: Tensor, sigma: float) -> Tensor:
        asked.append((x, sigma))
        return torch.sin(x)

    trajectory = solver(velocity_fn, latents, sigmas)
    assert len(trajectory) == 6
    assert trajectory[0] is latents
    assert [sigma for _, sigma in asked] == sigmas[:-1].tolist()
    assert all(x is latents for (x, _), latents in zip(asked, trajectory, strict=False))


def test_euler_is_exact_for_constant_velocity():
    latents, sigmas = torch.randn(2, 4, 8, 8), torch.linspace(1, 0, 5)
    trajectory = euler(lambda x, sigma: torch.full_like(x, 3.0), latents, sigmas)
    for x, sigma in zip(trajectory, sigmas.tolist(), strict=True):
        torch.testing.assert_close(x, latents - 3.0 * (1 - sigma))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_constant_clean_prediction_gives_the_straight_line_to_it(solver: Solver, shift: float):
    """The velocity `(x - clean) / sigma` leads along `(1 - sigma) * clean + sigma * noise` in any steps."""
    noise, clean, sigmas = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), flow_sigmas(6, shift)
    trajectory = solver(lambda x, sigma: (x - clean) / sigma, noise, sigmas)
    for x, sigma in zip(trajectory, sigmas.tolist(), strict=True):
        torch.testing.assert_close(x, (1 - sigma) * clean + sigma * noise, rtol=0, atol=3e-6)


def test_dpmpp_2m_is_exact_for_a_clean_prediction_linear_in_the_log_snr_up_to_its_quadrature():
    """Its second-order step integrates D + (lambda - lambda_s) D' with D' from the last two predictions.

    The integral of `exp(lambda) (lambda - lambda_s)` is replaced by `(exp(h) - 1) h / 2` (Algorithm 2, 2M).
    """
    sigmas, slope = [0.8, 0.5, 0.3], 1.7
    lambdas = [math.log((1 - s) / s) for s in sigmas]
    latents, clean = torch.tensor([0.9]), torch.tensor([slope * lambdas[1]])
    stepped = dpmpp_2m_step(latents, clean, sigmas[1], sigmas[2], (sigmas[0], torch.tensor([slope * lambdas[0]])))
    h = lambdas[2] - lambdas[1]
    expected = 0.3 / 0.5 * latents + (1 - 0.3) * (1 - math.exp(-h)) * (clean + 0.5 * h * slope)
    torch.testing.assert_close(stepped, expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_last_step_is_first_order_and_lands_on_the_clean_prediction(shift: float):
    seen: list[Tensor] = []

    def velocity_fn(x: Tensor, sigma: float) -> Tensor:
        velocity = gaussian_velocity(x, sigma)
        seen.append(x - sigma * velocity)
        return velocity

    trajectory = dpmpp_2m(velocity_fn, torch.randn(50), flow_sigmas(6, shift))
    torch.testing.assert_close(trajectory[-1], seen[-1], rtol=0, atol=0)


def test_the_first_two_steps_from_pure_noise_are_euler_steps():
    """At sigma 1 the log-SNR is minus infinity, so the second step has no history to extrapolate from."""
    noise, sigmas = torch.randn(50, dtype=torch.float64), flow_sigmas(6)
    second_order, first_order = (solver(gaussian_velocity, noise, sigmas) for solver in (dpmpp_2m, euler))
    torch.testing.assert_close(second_order[1], first_order[1])
    torch.testing.assert_close(second_order[2], first_order[2])
    assert (second_order[3] - first_order[3]).abs().max() > 1e-3


# Order --------------------------------------------------------------------------------------------------------------


def test_the_gaussian_flow_solves_its_own_differential_equation():
    """Of the test's own reference: its derivative is its velocity."""
    noise, sigma, step = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.4, 1e-6
    slope = (gaussian_solution(noise, sigma + step) - gaussian_solution(noise, sigma - step)) / (2 * step)
    torch.testing.assert_close(gaussian_velocity(gaussian_solution(noise, sigma), sigma), slope, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [160, 320])
def test_dpmpp_2m_is_of_second_order(num_steps: int, shift: float):
    """From pure noise to a tenth of the time: half the step, a quarter of the error."""
    coarse, fine = (error(dpmpp_2m, k, shift, share=0.9) for k in (num_steps, 2 * num_steps))
    assert math.log2(coarse / fine) >= 1.9


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpmpp_2m_down_to_sigma_0_is_of_second_order_up_to_a_logarithm(shift: float):
    """The log-SNR has no end, so steps near sigma 0 stay long in it: the error is `h^2 log(1 / h)`."""
    coarse, fine = (error(dpmpp_2m, k, shift) * k**2 / math.log(k) for k in (512, 1024))
    assert fine == pytest.approx(coarse, rel=0.1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_of_first_order(shift: float):
    coarse, fine = (error(euler, k, shift) for k in (160, 320))
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.1)


# Diffusers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("first", [0, 1], ids=["from_sigma_1", "from_below_1"])
def test_dpmpp_2m_agrees_with_diffusers_on_the_same_sigmas(first: int, shift: float):
    from diffusers import DPMSolverMultistepScheduler

    sigmas = flow_sigmas(10, shift)[first:]
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas, scheduler.timesteps = sigmas, 1000 * sigmas[:-1]  # its own are rounded and start at 0.999

    latents = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    trajectory = dpmpp_2m(gaussian_velocity, latents, sigmas)
    x = latents
    for index, (timestep, sigma) in enumerate(zip(scheduler.timesteps, sigmas.tolist(), strict=False)):
        x = scheduler.step(gaussian_velocity(x, sigma), timestep, x, return_dict=False)[0]
        torch.testing.assert_close(trajectory[index + 1], x, rtol=0, atol=1e-5)
