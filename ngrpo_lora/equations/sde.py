"""Stochastic steps of the SDE baselines for rectified flow: `latents = (1 - sigma) * clean + sigma * noise`.

All have the form of Neighbor GRPO's Eq. 5, an Euler step that trades some of the predicted noise for fresh noise:

    x' = x + (sigma_next - sigma) * v - removed * (x + (1 - sigma) * v) + std * fresh

They differ in `std` and `removed`. Flow-GRPO and DanceGRPO discretise an SDE: `removed = std^2 / (2 * sigma)`, Eq. 5
itself, which keeps the flow's marginals in the limit of small steps. CPS removes `sigma_next - sqrt(sigma_next^2 -
std^2)`, which keeps the noise level for any step if the predictions are exact.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class SdeStep(NamedTuple):
    """The Gaussian of the latents at sigma_next, `N(mean, std^2)`: the policy of an SDE baseline.

    Attributes:
        mean: (B, ...), affine in the velocity.
        std: the same for all dimensions; 0 is a deterministic step, which has no log-probability.
        velocity_coefficient: the derivative of `mean` by the velocity. Times a difference of velocities it is the
            displacement of the mean, which a difference of two means has already rounded away.
    """

    mean: Tensor
    std: float
    velocity_coefficient: float


def flow_sde_step(
    latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, eta: float, sigma_max: float
) -> SdeStep:
    """Flow-GRPO's step (arXiv 2505.05470) and MixGRPO's: `std^2 = eta^2 * (sigma - sigma_next) * sigma / (1 - sigma)`.

    At sigma 1 the denominator is `1 - sigma_max`. That first step does not keep the marginal, however fine it is: its
    variance is `eta^4 / 4` too large, for later steps to remove. From a sigma below 1 the error is of first order. The
    step to sigma 0 leaves noise of `std = eta * sigma / sqrt(1 - sigma)` in the latents.

    Args:
        latents, velocity: (B, ...) at sigma.
        sigma, sigma_next: noise levels, `1 >= sigma > sigma_next >= 0`.
        eta: noise strength, 0 for the Euler step; the paper's a.
        sigma_max: the schedule's `sigmas[1]`, in [0, 1).
    Raises:
        ValueError: shapes that do not agree, sigmas that do not decrease within [0, 1], an eta that is
            negative or not finite, or a sigma_max outside [0, 1).
    """
    _check_step(latents, velocity, sigma, sigma_next, eta)
    if not 0 <= sigma_max < 1:
        raise ValueError(f"sigma_max must be in [0, 1), got {sigma_max}")
    std = eta * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_max)) * (sigma - sigma_next))
    return _step(latents, velocity, sigma, sigma_next, std, removed=std**2 / (2 * sigma))


def dance_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, eta: float) -> SdeStep:
    """DanceGRPO's step (arXiv 2505.07818), with constant diffusion: `std^2 = eta^2 * (sigma - sigma_next)`.

    Of first order on Gaussian data, from sigma 1 to 0. On data of no width a step multiplies the deviation from them
    by `sigma_next / sigma - eta^2 * (sigma - sigma_next) / (2 * sigma^2)`: the last of K equal steps, by
    `-eta^2 * K / 2`, so that more steps are worse. The step to sigma 0 leaves noise of `std = eta * sqrt(sigma)` in
    the latents; DanceGRPO decodes the clean prediction instead.

    Arguments and errors as `flow_sde_step`.
    """
    _check_step(latents, velocity, sigma, sigma_next, eta)
    std = eta * math.sqrt(sigma - sigma_next)
    return _step(latents, velocity, sigma, sigma_next, std, removed=std**2 / (2 * sigma))


def cps_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, eta: float) -> SdeStep:
    """Coefficients-preserving sampling, Flow-CPS (arXiv 2509.05952): `std = sigma_next * sin(eta * pi / 2)`.

    With the predicted clean and noise, `mean = (1 - sigma_next) * clean + sqrt(sigma_next^2 - std^2) * noise`: exact
    predictions give latents of exactly `sigma_next`, at any step size. But the std does not shrink with the step, so
    this is no SDE: with ever more steps Gaussian data keep only `cos^2(eta * pi / 4)` of their variance. The step to
    sigma 0 is deterministic and gives the clean prediction.

    Arguments and errors as `flow_sde_step`, but eta is in [0, 1]; at 1 all noise is fresh.
    """
    _check_step(latents, velocity, sigma, sigma_next, eta)
    if eta > 1:
        raise ValueError(f"eta must be in [0, 1] for CPS, got {eta}")
    std = sigma_next * math.sin(eta * math.pi / 2)
    removed = 2 * sigma_next * math.sin(eta * math.pi / 4) ** 2  # sigma_next - sqrt(sigma_next^2 - std^2)
    return _step(latents, velocity, sigma, sigma_next, std, removed)


def _step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, std: float, removed: float) -> SdeStep:
    """Eq. 5, gathered by latents and velocity; `removed = 0` is the Euler step to the last bit."""
    coefficient = sigma_next - sigma - removed * (1 - sigma)
    return SdeStep((1 - removed) * latents + coefficient * velocity, std, coefficient)


def log_prob(latents_next: Tensor, step: SdeStep) -> Tensor:
    """Log-density of latents under a step, as the mean over all but the batch dimension: (B, ...) -> (B,) float64.

    The mean instead of the sum is what all the baselines take: their ratios are D-th roots, D the dimensions.

    Raises:
        ValueError: shapes that do not agree, or a step whose std is not positive and finite.
    """
    _check_shapes(latents_next=latents_next, mean=step.mean)
    _check_std(step.std)
    deviation = (latents_next.double() - step.mean.double()) / step.std
    return -deviation.square().flatten(1).mean(1) / 2 - math.log(step.std * math.sqrt(2 * math.pi))


def log_ratio(noise: Tensor, displacement: Tensor, std: float) -> Tensor:
    """Exact `log pi_theta - log pi_old` of a sample `x' = mean_old + std * noise`, without cancellation.

    With `u = mean_theta - mean_old` it is `noise * u / std - u^2 / (2 * std^2)`, averaged over dimensions as in
    `log_prob`: exactly 0 at u = 0. The difference of two float32 log-probabilities is off by 1e-7, more than the whole
    ratio after a small update, and does not see a u below the resolution of the latents.

    Args:
        noise: (B, ...) the fresh noise of the sample.
        displacement: (B, ...) `u = velocity_coefficient * (v_theta - v_old)`.
        std: of the step, > 0.
    Returns:
        (B,) float64, differentiable in `displacement`.
    Raises:
        ValueError: shapes that do not agree, or an std that is not positive and finite.
    """
    _check_shapes(noise=noise, displacement=displacement)
    _check_std(std)
    shift = displacement.double() / std  # (B, ...), in standard deviations
    return (shift * (noise.double() - shift / 2)).flatten(1).mean(1)


def cps_log_ratio(noise: Tensor, displacement: Tensor, std: float) -> Tensor:
    """The same for CPS, whose log-probability is `-(x' - mean)^2` without its scale: `2 * std^2 * log_ratio`.

    Arguments, result and errors as `log_ratio`.
    """
    return 2 * std**2 * log_ratio(noise, displacement, std)


def guard_log_ratio(noise: Tensor, displacement: Tensor) -> Tensor:
    """GRPO-Guard's (arXiv 2510.22319): `log_ratio` without its bias `-u^2 / (2 std^2)` and times std.

    Arguments, result and errors as `log_ratio`, which has the scale that this one lacks.
    """
    _check_shapes(noise=noise, displacement=displacement)
    return (noise.double() * displacement.double()).flatten(1).mean(1)


def _check_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float, eta: float) -> None:
    _check_shapes(latents=latents, velocity=velocity)
    if not 1 >= sigma > sigma_next >= 0:
        raise ValueError(f"sigmas must decrease within [0, 1], got sigma {sigma} and sigma_next {sigma_next}")
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be >= 0 and finite, got {eta}")


def _check_shapes(**tensors: Tensor) -> None:
    first, second = (tuple(tensor.shape) for tensor in tensors.values())
    if len(first) < 2 or first != second:
        raise ValueError(f"{' and '.join(tensors)} must be (B, ...) of one shape, got {first} and {second}")


def _check_std(std: float) -> None:
    if not 0 < std < math.inf:
        raise ValueError(f"std must be positive and finite, got {std}: a deterministic step has no log-probability")
