"""Errors of the solvers on a flow whose exact solution is known: `ngrpo bench solver`.

Data are a mixture of two normal distributions on a line. Their velocity is a formula, nonlinear in latents and noise
level. As the ODE keeps the order of points, its solution is the point below which as much of the distribution lies.

Between two noise levels inside (0, 1) DPM-Solver++ 2M is of second order. From noise to data it is of second order but
for a logarithm: near sigma 1 and 0 the steps of log-SNR, in which it extrapolates, do not shrink as steps become more
(the k-th from either end stays near 1 / k), so that errors add up to log(K) / K^2, whose slope nears 2 from below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngrpo_lora.equations.solvers import SOLVERS, shifted

__all__ = ["Errors", "cumulative", "measure", "solve", "solver_table", "velocity"]

WEIGHTS, MEANS, STDS = torch.tensor([[0.4, 0.6], [-1.0, 1.2], [0.5, 0.7]], dtype=torch.float64)
NOISE = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)
INSIDE = (0.95, 0.05)


@dataclass(frozen=True)
class Errors:
    """Root mean square errors over the points `NOISE` after `num_steps` steps."""

    num_steps: int
    inside: float
    """DPM-Solver++ 2M, between the times `INSIDE`."""
    whole: float
    """DPM-Solver++ 2M from noise to data, as are all errors that follow."""
    euler: float
    integer: float
    """diffusers' DPM-Solver++ 2M as it comes: its own noise levels, the model asked at integer timesteps."""
    exact: float
    """diffusers' DPM-Solver++ 2M, the model asked at the noise levels that it steps with."""


def _components(sigma: float) -> tuple[Tensor, Tensor]:
    """(2,) means and (2,) standard deviations of the two distributions of latents."""
    return (1 - sigma) * MEANS, ((1 - sigma) * STDS).square().add(sigma**2).sqrt()


def velocity(latents: Tensor, sigma: float) -> Tensor:
    """Exact velocity of the mixture, `E[noise - clean | latents]`, (N,) float64."""
    means, stds = _components(sigma)
    standard = (latents[:, None] - means) / stds  # (N, 2)
    shares = torch.softmax(WEIGHTS.log() - stds.log() - standard.square() / 2, 1)
    noise, clean = sigma * standard / stds, MEANS + (1 - sigma) * STDS.square() * standard / stds
    return (shares * (noise - clean)).sum(1)


def cumulative(latents: Tensor, sigma: float) -> Tensor:
    """Share of the distribution of latents that lies below each of them, (N,) in [0, 1]."""
    means, stds = _components(sigma)
    return (WEIGHTS * torch.special.ndtr((latents[:, None] - means) / stds)).sum(1)


def solve(latents: Tensor, sigma: float, sigma_end: float) -> Tensor:
    """Latents (N,) at `sigma_end` to which the ODE leads from those at `sigma`, to 1e-14, by bisection."""
    below = cumulative(latents, sigma)
    low, high = torch.full_like(latents, -20.0), torch.full_like(latents, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        left = cumulative(middle, sigma_end) < below
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    return (low + high) / 2


def measure(num_steps: int, shift: float) -> Errors:
    """Measure all errors after a number of steps, at a shift of the schedule."""

    def ours(solver: str, start: float = 1.0, end: float = 0.0) -> float:
        sigmas = shifted(torch.linspace(start, end, num_steps + 1, dtype=torch.float64), shift)
        first, last = sigmas[0].item(), sigmas[-1].item()
        begin = solve(NOISE, 1.0, first)
        return _rms(SOLVERS[solver](velocity, begin, sigmas)[-1] - solve(begin, first, last))

    integer, exact = (_diffusers(num_steps, shift, rounded) for rounded in (True, False))
    return Errors(num_steps, ours("dpmpp_2m", *INSIDE), ours("dpmpp_2m"), ours("euler"), integer, exact)


def _diffusers(num_steps: int, shift: float, rounded: bool) -> float:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)  # or it looks for the first timestep, of which many steps have two
    levels = scheduler.timesteps / 1000 if rounded else scheduler.sigmas[:-1]
    begin = latents = solve(NOISE, 1.0, scheduler.sigmas[0].item())
    for timestep, level in zip(scheduler.timesteps, levels.tolist(), strict=True):
        latents = scheduler.step(velocity(latents, level), timestep, latents, return_dict=False)[0]  # pyright: ignore
    return _rms(latents - solve(begin, scheduler.sigmas[0].item(), 0.0))


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def solver_table(steps: Sequence[int], shifts: Sequence[float], tell: Callable[[str], None]) -> None:
    """Tell errors, and their slopes from one number of steps to the next, as a Markdown table for each shift."""
    columns = ("inside", "whole", "euler", "integer", "exact")
    tell("Root mean square errors; in brackets their slope, which is 2 for second order. Inside: between times")
    tell(f"{INSIDE[0]} and {INSIDE[1]}; all others from noise to data.")
    for shift in shifts:
        tell(f"\nshift {shift:g}\n")
        tell("| steps | DPM++ 2M, inside | DPM++ 2M | Euler | diffusers' DPM++ 2M | the same at exact noise levels |")
        tell("|---|---|---|---|---|---|")
        before: Errors | None = None
        for num_steps in sorted(set(steps)):
            errors = measure(num_steps, shift)
            cells = [f"{getattr(errors, name):.2e}{_slope(before, errors, name)}" for name in columns]
            tell(f"| {num_steps} | {' | '.join(cells)} |")
            before = errors


def _slope(before: Errors | None, after: Errors, name: str) -> str:
    """Slope of the error over the number of steps, both logarithmic, as text in brackets."""
    if before is None:
        return ""
    return f" ({math.log(getattr(before, name) / getattr(after, name), after.num_steps / before.num_steps):.2f})"
