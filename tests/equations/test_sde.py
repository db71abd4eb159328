"""The SDE baselines against their published formulas, and on flows whose marginals are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from ngrpo_lora.equations.sde import (
    SdeStep,
    cps_log_ratio,
    cps_step,
    dance_step,
    flow_sde_step,
    log_prob,
    log_ratio,
)

Step = Callable[[Tensor, Tensor, float, float, float], SdeStep]

SIGMA_MAX = 0.9  # sigmas[1] of ten steps
DIMS = 262_144  # 16 channels of 128 x 128: 1024 px
MEAN = 0.7  # of the clean data


def flow(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, eta: float) -> SdeStep:
    return flow_sde_step(latents, velocity, sigma, sigma_next, eta, SIGMA_MAX)


STEPS: dict[str, Step] = {"flow": flow, "dance": dance_step, "cps": cps_step}
SIGMAS = [(1.0, 0.9), (0.9, 0.75), (0.5, 0.2), (0.1, 0.0)]

every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
every_sigma = pytest.mark.parametrize(("sigma", "sigma_next"), SIGMAS)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The formulas -------------------------------------------------------------------------------------------------------


@every_sigma
def test_flow_sde_is_flow_grpos_formula(sigma: float, sigma_next: float):
    x, v, eta, dt = normal(2, 5, seed=0), normal(2, 5, seed=1), 0.7, sigma_next - sigma
    noise_level = eta * math.sqrt(sigma / (1 - min(sigma, SIGMA_MAX)))
    mean = x * (1 + noise_level**2 / (2 * sigma) * dt) + v * (1 + noise_level**2 * (1 - sigma) / (2 * sigma)) * dt
    found = flow(x, v, sigma, sigma_next, eta)
    torch.testing.assert_close(found.mean, mean)
    assert found.std == pytest.approx(noise_level * math.sqrt(-dt))


def test_sigma_max_matters_only_at_sigma_1():
    x, v = normal(2, 5, seed=0), normal(2, 5, seed=1)
    assert torch.equal(flow_sde_step(x, v, 0.8, 0.5, 0.7, 0.1).mean, flow_sde_step(x, v, 0.8, 0.5, 0.7, 0.9).mean)
    assert flow_sde_step(x, v, 1.0, 0.5, 0.7, 0.0).std == pytest.approx(0.7 * math.sqrt(0.5))


@every_sigma
def test_dance_is_dance_grpos_formula(sigma: float, sigma_next: float):
    x, v, eta, dt = normal(2, 5, seed=0), normal(2, 5, seed=1), 0.3, sigma_next - sigma
    score = -(x - (x - sigma * v) * (1 - sigma)) / sigma**2
    found = dance_step(x, v, sigma, sigma_next, eta)
    torch.testing.assert_close(found.mean, x + v * dt - 0.5 * eta**2 * score * dt)
    assert found.std == pytest.approx(eta * math.sqrt(-dt))


@every_sigma
def test_cps_is_flow_cps_formula(sigma: float, sigma_next: float):
    x, v, std = normal(2, 5, seed=0), normal(2, 5, seed=1), sigma_next * math.sin(0.8 * math.pi / 2)
    mean = (1 - sigma_next) * (x - sigma * v) + math.sqrt(sigma_next**2 - std**2) * (x + (1 - sigma) * v)
    found = cps_step(x, v, sigma, sigma_next, 0.8)
    torch.testing.assert_close(found.mean, mean)
    assert found.std == pytest.approx(std)


@every_sigma
@pytest.mark.parametrize("step", [flow, dance_step])
def test_the_two_sdes_are_the_papers_equation_5(step: Step, sigma: float, sigma_next: float):
    x, v = normal(2, 5, seed=0), normal(2, 5, seed=1)
    found = step(x, v, sigma, sigma_next, 0.7)
    predicted_noise = x + (1 - sigma) * v
    expected = x + (sigma_next - sigma) * v - found.std**2 / (2 * sigma) * predicted_noise
    torch.testing.assert_close(found.mean, expected)


@every_step
@every_sigma
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eta_0_is_exactly_the_euler_step(step: Step, sigma: float, sigma_next: float, dtype: torch.dtype):
    x, v = normal(2, 3, 4, seed=0, dtype=dtype), normal(2, 3, 4, seed=1, dtype=dtype)
    mean, std, coefficient = step(x, v, sigma, sigma_next, 0.0)
    assert torch.equal(mean, x + (sigma_next - sigma) * v)
    assert (std, coefficient) == (0.0, sigma_next - sigma)


@every_step
@every_sigma
def test_the_velocity_coefficient_is_the_derivative_of_the_mean(step: Step, sigma: float, sigma_next: float):
    velocity = normal(2, 5, seed=1).requires_grad_()
    found = step(normal(2, 5, seed=0), velocity, sigma, sigma_next, 0.6)
    (gradient,) = torch.autograd.grad(found.mean.sum(), velocity)
    torch.testing.assert_close(gradient, torch.full((2, 5), found.velocity_coefficient, dtype=torch.float64))


def test_what_the_last_step_leaves_in_the_latents():
    x, v, sigma, eta = normal(2, 5, seed=0), normal(2, 5, seed=1), 0.2, 0.7
    assert flow(x, v, sigma, 0.0, eta).std == pytest.approx(eta * sigma / math.sqrt(1 - sigma))
    assert dance_step(x, v, sigma, 0.0, eta).std == pytest.approx(eta * math.sqrt(sigma))
    assert cps_step(x, v, sigma, 0.0, eta).std == 0
    torch.testing.assert_close(cps_step(x, v, sigma, 0.0, eta).mean, x - sigma * v)


# Marginals of Gaussian data: clean ~ N(MEAN, width^2) ---------------------------------------------------------------


def gaussian_velocity(x: Tensor, sigma: float, width: float) -> Tensor:
    """E[noise - clean | x]."""
    variance = ((1 - sigma) * width) ** 2 + sigma**2
    offset = x - (1 - sigma) * MEAN
    return offset * sigma / variance - (MEAN + offset * (1 - sigma) * width**2 / variance)


def marginal(sigma: float, width: float) -> tuple[float, float]:
    """Mean and variance of the flow itself."""
    return (1 - sigma) * MEAN, ((1 - sigma) * width) ** 2 + sigma**2


def sampled(step: Step, sigmas: list[float], eta: float, width: float) -> tuple[float, float]:
    """Mean and variance of the latents at `sigmas[-1]`, exactly: every step is `slope * x + offset + std * fresh`."""
    mean, variance = marginal(sigmas[0], width)
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        ends, std, _ = step(points, gaussian_velocity(points, sigma, width), sigma, sigma_next, eta)
        offset, slope = ends[0].item(), (ends[1] - ends[0]).item()
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    return mean, variance


def linear(num_steps: int, start: float = 1.0, end: float = 0.0) -> list[float]:
    return torch.linspace(start, end, num_steps + 1, dtype=torch.float64).tolist()


@pytest.mark.parametrize(
    ("step", "eta", "start", "end"),
    [(flow, 0.3, 0.9, 0.1), (flow, 0.7, 0.9, 0.0), (dance_step, 0.3, 1.0, 0.0), (dance_step, 0.7, 0.9, 0.1)],
)
def test_the_sdes_converge_to_the_flows_marginal_at_first_order(step: Step, eta: float, start: float, end: float):
    expected_mean, expected = marginal(end, 0.4)
    errors = []
    for num_steps in (200, 400):
        mean, variance = sampled(step, linear(num_steps, start, end), eta, 0.4)
        assert mean == pytest.approx(expected_mean, abs=1e-12)
        errors.append(variance - expected)
    assert abs(errors[0]) < 5e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("num_steps", [10, 1000, 100_000])
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_flow_sdes_first_step_has_too_much_variance_however_fine_it_is(eta: float, num_steps: int):
    sigma = 1 - 1 / num_steps
    _, variance = sampled(lambda *args: flow_sde_step(*args, sigma_max=sigma), [1.0, sigma], eta, 0.4)
    assert variance == pytest.approx((sigma - eta**2 / 2) ** 2 + eta**2)
    assert variance - marginal(sigma, 0.4)[1] == pytest.approx(eta**4 / 4, abs=eta**2 / num_steps)


def test_flow_sdes_later_steps_remove_that_variance():
    sigmas = linear(1000)
    _, variance = sampled(lambda *args: flow_sde_step(*args, sigma_max=sigmas[1]), sigmas, 0.7, 0.4)
    assert abs(variance - 0.4**2) < 1e-3 < 0.7**4 / 4


@pytest.mark.parametrize("num_steps", [1, 10, 100])
def test_dance_overshoots_on_data_of_no_width_the_more_the_finer_the_last_step_is(num_steps: int):
    sigma, eta = 1 / num_steps, 0.3
    _, variance = sampled(dance_step, [sigma, 0.0], eta, 0.0)
    factor = -(eta**2) * num_steps / 2
    assert variance == pytest.approx((factor * sigma) ** 2 + eta**2 * sigma)


@every_sigma
@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
def test_cps_keeps_the_coefficients_of_exact_predictions_for_any_step_size(sigma: float, sigma_next: float, eta: float):
    clean, noise = normal(2, 5, seed=0), normal(2, 5, seed=1)
    mean, std, _ = cps_step((1 - sigma) * clean + sigma * noise, noise - clean, sigma, sigma_next, eta)
    kept = (mean - (1 - sigma_next) * clean) / noise  # the coefficient of the old noise, the same everywhere
    assert torch.allclose(kept, kept.mean().expand(2, 5), atol=1e-12)
    assert kept.mean().item() ** 2 + std**2 == pytest.approx(sigma_next**2)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_cps_keeps_every_marginal_of_data_of_no_width(eta: float, num_steps: int):
    sigmas = linear(num_steps)
    for end in range(1, num_steps + 1):
        found, expected = sampled(cps_step, sigmas[: end + 1], eta, 0.0), marginal(sigmas[end], 0.0)
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("eta", [0.4, 0.8, 1.0])
def test_cps_does_not_converge_to_the_flows_marginal_but_narrows_gaussian_data(eta: float):
    limit, errors = 0.4**2 * math.cos(eta * math.pi / 4) ** 2, []
    for num_steps in (500, 1000):
        mean, variance = sampled(cps_step, linear(num_steps), eta, 0.4)
        assert mean == pytest.approx(MEAN, abs=1e-12)
        errors.append(abs(variance - limit))
    assert errors[1] < 0.7 * errors[0] < 1.5e-3 < 0.4**2 - limit


# Log-probabilities --------------------------------------------------------------------------------------------------


@every_step
def test_log_prob_is_the_normals_averaged_over_dimensions(step: Step):
    found = step(normal(3, 4, 5, seed=0), normal(3, 4, 5, seed=1), 0.5, 0.4, 0.7)
    latents_next = normal(3, 4, 5, seed=2)
    expected = Normal(found.mean, found.std).log_prob(latents_next).mean((1, 2))
    torch.testing.assert_close(log_prob(latents_next, found), expected)


def displaced(std: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean_old, noise, displacement and the sample, (3, 4, 5) float64."""
    mean, noise, displacement = normal(3, 4, 5, seed=0), normal(3, 4, 5, seed=1), 0.2 * normal(3, 4, 5, seed=2)
    return mean, noise, displacement, mean + std * noise


def test_log_ratio_is_the_difference_of_two_log_probs():
    mean, noise, displacement, sample = displaced()
    old, new = SdeStep(mean, 0.3, 1.0), SdeStep(mean + displacement, 0.3, 1.0)
    torch.testing.assert_close(log_ratio(noise, displacement, 0.3), log_prob(sample, new) - log_prob(sample, old))


def test_cps_log_ratio_is_the_difference_of_two_negative_squares():
    mean, noise, displacement, sample = displaced()
    old, new = (-(sample - mu).square().mean((1, 2)) for mu in (mean, mean + displacement))
    torch.testing.assert_close(cps_log_ratio(noise, displacement, 0.3), new - old)


@every_step
def test_the_displacement_comes_from_the_velocities(step: Step):
    x, v_old, v_new, noise = (normal(3, 4, 5, seed=seed) for seed in range(4))
    old, new = step(x, v_old, 0.5, 0.4, 0.7), step(x, v_new, 0.5, 0.4, 0.7)
    sample = old.mean + old.std * noise
    found = log_ratio(noise, old.velocity_coefficient * (v_new - v_old), old.std)
    torch.testing.assert_close(found, log_prob(sample, new) - log_prob(sample, old))


@pytest.mark.parametrize("function", [log_ratio, cps_log_ratio])
def test_an_unchanged_mean_has_a_log_ratio_of_exactly_0_and_a_gradient(function: Callable[..., Tensor]):
    displacement = torch.zeros(2, DIMS, requires_grad=True)
    found = function(normal(2, DIMS, seed=0, dtype=torch.float32), displacement, 0.05)
    assert torch.equal(found, torch.zeros(2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found.sum(), displacement)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(("function", "scale"), [(log_ratio, 1.0), (cps_log_ratio, 2 * 0.3**2)])
def test_the_gradient_is_that_of_the_normal(function: Callable[..., Tensor], scale: float):
    mean, noise, displacement, sample = displaced()
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    displacement.requires_grad_()
    new_log_prob = Normal(mean + displacement, 0.3).log_prob(sample).mean((1, 2))
    (expected,) = torch.autograd.grad((scale * weights * new_log_prob).sum(), displacement)
    (found,) = torch.autograd.grad((weights * function(noise, displacement, 0.3)).sum(), displacement)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("std", "size", "naive_error"),
    [(1e-3, 1e-2, 1e-6), (1e-2, 1e-4, 3e-8), (5e-2, 1e-4, 3e-8)],  # log ratios of 6e-6, 6e-8 and 6e-8
)
def test_log_ratio_in_float32_at_262144_dimensions(std: float, size: float, naive_error: float):
    mean, noise, sideways = (normal(1, DIMS, seed=seed, dtype=torch.float32) for seed in range(3))
    displacement = size * std * (sideways + 0.3 * noise) / math.sqrt(DIMS)
    old, new = (m.double() for m in (mean, displacement))
    sample = old + std * noise.double()
    expected = (Normal(old + new, std).log_prob(sample) - Normal(old, std).log_prob(sample)).mean(1)

    naive_sample = mean + std * noise
    naive_old, naive_new = (Normal(m, std).log_prob(naive_sample).mean(1) for m in (mean, mean + displacement))
    assert (naive_new - naive_old - expected).abs().item() > naive_error
    torch.testing.assert_close(log_ratio(noise, displacement, std), expected, rtol=1e-6, atol=1e-13)


# Errors -------------------------------------------------------------------------------------------------------------


@every_step
@pytest.mark.parametrize("shapes", [((2, 3), (2, 1)), ((2, 3), (3,)), ((3,), (3,)), ((2, 3, 1), (2, 3))])
def test_latents_and_velocity_of_two_shapes_are_an_error(step: Step, shapes: tuple[tuple, tuple]):
    with pytest.raises(ValueError, match=r"latents and velocity must be \(B, \.\.\.\) of one shape, got"):
        step(torch.zeros(shapes[0]), torch.zeros(shapes[1]), 0.5, 0.4, 0.7)


@every_step
@pytest.mark.parametrize("sigmas", [(0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1), (math.nan, 0.1), (0.0, 0.0)])
def test_sigmas_that_do_not_decrease_are_an_error(step: Step, sigmas: tuple[float, float]):
    message = rf"sigmas must decrease within \[0, 1\], got sigma {sigmas[0]} and sigma_next {sigmas[1]}"
    with pytest.raises(ValueError, match=message):
        step(torch.zeros(2, 3), torch.zeros(2, 3), *sigmas, 0.7)


@every_step
@pytest.mark.parametrize("eta", [-0.1, math.inf, math.nan])
def test_an_eta_that_is_negative_or_infinite_is_an_error(step: Step, eta: float):
    with pytest.raises(ValueError, match=f"eta must be >= 0 and finite, got {eta}"):
        step(torch.zeros(2, 3), torch.zeros(2, 3), 0.5, 0.4, eta)


def test_an_eta_above_1_is_an_error_for_cps():
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\] for CPS, got 1.2"):
        cps_step(torch.zeros(2, 3), torch.zeros(2, 3), 0.5, 0.4, 1.2)


@pytest.mark.parametrize("sigma_max", [1.0, -0.1, math.nan])
def test_a_sigma_max_that_leaves_no_denominator_is_an_error(sigma_max: float):
    with pytest.raises(ValueError, match=rf"sigma_max must be in \[0, 1\), got {sigma_max}"):
        flow_sde_step(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, 0.9, 0.7, sigma_max)


@pytest.mark.parametrize("std", [0.0, -0.1, math.inf, math.nan])
def test_a_deterministic_step_has_no_log_prob(std: float):
    zeros = torch.zeros(2, 3)
    for call in (
        lambda: log_prob(zeros, SdeStep(zeros, std, 1.0)),
        lambda: log_ratio(zeros, zeros, std),
        lambda: cps_log_ratio(zeros, zeros, std),
    ):
        with pytest.raises(ValueError, match=f"std must be positive and finite, got {std}"):
            call()


@pytest.mark.parametrize("shape", [(2, 1), (3,), (2, 3, 1), ()])
def test_log_probs_of_two_shapes_are_an_error(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"latents_next and mean must be \(B, \.\.\.\)"):
        log_prob(torch.zeros(shape), SdeStep(torch.zeros(2, 3), 0.1, 1.0))
    with pytest.raises(ValueError, match=r"noise and displacement must be \(B, \.\.\.\)"):
        log_ratio(torch.zeros(2, 3), torch.zeros(shape), 0.1)
