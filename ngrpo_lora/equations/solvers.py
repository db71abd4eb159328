"""Deterministic ODE solvers for rectified flow: `latents = (1 - sigma) * clean + sigma * noise`.

`velocity_fn(latents, sigma)` is the model; sigma is the very float of `sigmas`, never an integer timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

VelocityFn = Callable[[Tensor, float], Tensor]


def flow_sigmas(num_steps: int, shift: float = 1.0) -> Tensor:
    """(K + 1,) float32 noise levels from exactly 1 to exactly 0: `s * t / (1 + (s - 1) * t)`, t = 1 - k / K.

    `shift` is SD3's static shift (arXiv 2403.03206, Eq. 23); FLUX's dynamic shift is `exp(mu)`.

    Raises:
        ValueError: fewer than one step, or a shift that is not positive and finite.
    """
    if num_steps < 1 or not 0 < shift < math.inf:
        raise ValueError(f"num_steps must be >= 1 and shift > 0 and finite, got {num_steps} and {shift}")
    return shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] -> noise levels `s * t / (1 + (s - 1) * t)`, 0 and 1 kept (arXiv 2403.03206, Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def stretch_to_terminal(sigmas: Tensor, terminal: float) -> Tensor:
    """(K + 1,) noise levels from 1 to 0 with all but the last stretched about 1, so that `sigmas[K - 1]` is `terminal`.

    Schedulers call it `shift_terminal`; source: diffusers' `FlowMatchEulerDiscreteScheduler`. A single step has nothing
    to stretch.
    """
    if len(sigmas) == 2:
        return sigmas
    away = 1 - sigmas[:-1].double()
    return torch.cat([(1 - away * (1 - terminal) / away[-1]).to(sigmas.dtype), sigmas[-1:]])


def euler(velocity_fn: VelocityFn, latents: Tensor, sigmas: Tensor) -> list[Tensor]:
    """Euler steps, which for rectified flow are DDIM's: `x + (sigma_next - sigma) * v` (Eq. 2).

    Args:
        velocity_fn: (latents, sigma) -> velocity, both (B, ...).
        latents: (B, ...) at `sigmas[0]`.
        sigmas: (K + 1,), decreasing.
    Returns:
        K + 1 latents, the given ones first.
    """
    trajectory = [latents]
    for sigma, sigma_next in pairs(sigmas):
        velocity = velocity_fn(trajectory[-1], sigma)
        trajectory.append(trajectory[-1] + (sigma_next - sigma) * velocity)
    return trajectory


def dpmpp_2m(
    velocity_fn: VelocityFn, latents: Tensor, sigmas: Tensor, history: tuple[float, Tensor] | None = None
) -> list[Tensor]:
    """DPM-Solver++ 2M in data prediction (arXiv 2211.01095, Algorithm 2) for rectified flow.

    First order at the first step, unless `history` has the (sigma, clean prediction) of the step before it, and at a
    step to sigma 0, where the second-order term is 1/0. Arguments and result as `euler`; second order in the step size.
    """
    trajectory = [latents]
    for sigma, sigma_next in pairs(sigmas):
        current = trajectory[-1]
        clean = current - sigma * velocity_fn(current, sigma)
        trajectory.append(dpmpp_2m_step(current, clean, sigma, sigma_next, history))
        history = (sigma, clean)
    return trajectory


def dpmpp_2m_step(
    latents: Tensor, clean: Tensor, sigma: float, sigma_next: float, history: tuple[float, Tensor] | None
) -> Tensor:
    """One step of `dpmpp_2m`. `history` is the previous (sigma, clean), None at the first step.

    With log-SNR `lambda = log((1 - sigma) / sigma)`, the update `(sigma_next / sigma) * x - alpha_next *
    (exp(-h) - 1) * D` is exactly an interpolation towards the extrapolated clean prediction D.
    """
    target = clean
    if history is not None and sigma_next > 0:
        sigma_prev, clean_prev = history
        # At sigma 1 the log-SNR is -inf, the weight 0: the second step is first order, as in the limit.
        weight = 0.5 * (log_snr(sigma_next) - log_snr(sigma)) / (log_snr(sigma) - log_snr(sigma_prev))
        target = clean + weight * (clean - clean_prev)
    ratio = sigma_next / sigma
    return ratio * latents + (1 - ratio) * target


def log_snr(sigma: float) -> float:
    """Log signal-to-noise ratio of a noise level, `log((1 - sigma) / sigma)`; -inf at pure noise."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


def pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """(sigma, sigma_next) of every step, as floats.

    Raises:
        ValueError: not a decreasing sequence within [0, 1].
    """
    values = sigmas.tolist()
    if sigmas.ndim != 1 or len(values) < 2 or not 1 >= values[0] > values[-1] >= 0:
        raise ValueError(f"sigmas must be (K + 1,), decreasing within [0, 1], got {values}")
    if any(b >= a for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"sigmas must decrease at every step, got {values}")
    return list(zip(values, values[1:], strict=False))


SOLVERS: dict[str, Callable[[VelocityFn, Tensor, Tensor], list[Tensor]]] = {"dpmpp_2m": dpmpp_2m, "euler": euler}
