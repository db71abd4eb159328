"""The surrogate leaping policy and its clipped objective (Neighbor GRPO, Eq. 8 to 10), without cancellation.

A real latent has 262,144 dimensions and squared distances near 5e4, which float32 resolves to 3e-3: coarser
than the clip range. So no two distances are ever subtracted; everything follows from the displacement of the
anchor, taken from velocities, and is accumulated in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ngrpo_lora.types import are_finite, exact


class Leap(NamedTuple):
    """What displaced anchors change, both (M, G) float64.

    log_ratio: `log pi_theta(i) - log pi_old(i)`, differentiable in the displacement.
    log_old: `log pi_old(i)`.
    """

    log_ratio: Tensor
    log_old: Tensor


def leaping_logits(candidates: Tensor, anchor: Tensor, temperature: float) -> Tensor:
    """`-||x_i - x_anchor||^2 / tau` (Eq. 8 before the softmax): (G, ...), (...) -> (G,) float64.

    Raises:
        ValueError: a temperature that is not positive and finite.
    """
    check_temperature(temperature)
    offsets = (candidates - anchor).flatten(1).double()
    return torch.linalg.vector_norm(offsets, dim=1).square() / -temperature


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless a temperature is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def leaping_log_ratio(candidates: Tensor, anchor_old: Tensor, displacement: Tensor, temperature: float) -> Tensor:
    """Exact `log pi_theta(i) - log pi_old(i)` of the surrogate leaping policy (Eq. 8, 10), of one anchor: see `leap`.

    Args:
        candidates: (G, ...) the group at the transition's end.
        anchor_old: (...) the anchor's transition under the old weights, x_old.
        displacement: (...) `u = x_theta - x_old = (sigma_next - sigma) * (v_theta - v_old)`, from velocities:
            the difference of two latents has already lost it.
        temperature: tau > 0.
    Returns:
        (G,) float64, differentiable in `displacement`.
    Raises:
        ValueError: shapes that do not agree, or a temperature that is not positive and finite.
    """
    if candidates.ndim < 2 or not candidates.shape[1:] == anchor_old.shape == displacement.shape:
        shapes = [tuple(x.shape) for x in (candidates, anchor_old, displacement)]
        raise ValueError(f"candidates must be (G, ...) of anchor_old's and displacement's shape (...), got {shapes}")
    check_temperature(temperature)
    return leap(candidates[None], anchor_old[None], displacement[None], temperature).log_ratio[0]


def leap(
    candidates: Tensor,
    anchors_old: Tensor,
    displacements: Tensor,
    temperatures: Tensor | float,
    present: Tensor | None = None,
) -> Leap:
    """The surrogate leaping policy (Eq. 8, 10) of M anchors and its exact change, from one walk over the candidates.

    With `d_i = x_i - x_old`, the new logit is the old one plus `(2 <u, d_i> - ||u||^2) / tau`; the last term is
    common to all candidates and leaves the softmax. The normaliser's change is taken against the most probable
    candidate a, `delta_a + logsumexp_k(log p_k + delta_k - delta_a)`, which is stable for a saturated policy too.
    At u = 0 the ratio is exactly 0. No device is waited for.

    Args:
        candidates: (M, G, ...), each anchor's group.
        anchors_old, displacements: (M, ...), x_old and u.
        temperatures: tau > 0, one of all, or (M, 1).
        present: (M, G) bool, the candidates that there are; others have the probability 0, and any finite values.
    """
    offsets = (candidates - anchors_old[:, None]).flatten(2).double()  # (M, G, D)
    delta = (offsets @ displacements.flatten(1).double()[..., None])[..., 0] * (2 / temperatures)  # (M, G)
    logits = torch.linalg.vector_norm(offsets, dim=2).square() / -temperatures  # one walk, where vecdot writes squares
    if present is not None:
        logits, delta = logits.where(present, -torch.inf), delta.where(present, 0.0)
    old = torch.log_softmax(logits, 1)
    relative = delta - delta.gather(1, old.argmax(1, keepdim=True))
    # The latter is 0 but for rounding.
    growth = torch.logsumexp(old + relative, 1, keepdim=True) - torch.logsumexp(old, 1, keepdim=True)
    return Leap(relative - growth, old)


def auto_temperature(candidates: Tensor) -> float:
    """The mean squared distance between two candidates: (G, ...) -> tau, so that logits are of order 1.

    Raises:
        ValueError: fewer than two candidates.
    """
    if candidates.ndim < 2 or len(candidates) < 2:
        raise ValueError(f"candidates must be (G >= 2, ...), got {tuple(candidates.shape)}")
    return mean_squared_distances(candidates[None]).item()


def mean_squared_distances(candidates: Tensor) -> Tensor:
    """The same of W groups, (W, G, ...) -> (W,) float64 on the candidates' device, which is not waited for.

    Candidates that are not finite have no part in it. What Apple's GPUs give is on the CPU: see `exact`.
    """
    rows = exact(candidates).flatten(2).double()  # (W, G, D)
    finite = are_finite(rows)
    count, rows = finite.sum(1), rows.where(finite[..., None], 0.0)
    total, flat = rows.sum(1), rows.flatten(1)
    norms = torch.linalg.vector_norm(flat, dim=1), torch.linalg.vector_norm(total, dim=1)
    about_mean = norms[0].square() - norms[1].square() / count
    return 2 * about_mean / (count - 1)


def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """`sum_i min(A_i rho_i, A_i clip(rho_i, 1 - eps, 1 + eps))` (Eq. 9).

    A log-ratio beyond 80 counts as 80 and gives no gradient: an infinite ratio would make that of all others NaN.

    Args:
        log_ratio, advantages: (..., G).
    Returns:
        The objective, to be maximised, (...), and (..., G) bool: the terms that the clip holds back (no gradient).
    Raises:
        ValueError: a clip range that is not positive.
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}")
    ratio = log_ratio.clamp(max=80).exp()
    free, held = advantages * ratio, advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.minimum(free, held).sum(-1), held < free
