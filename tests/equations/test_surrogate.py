"""The surrogate leaping policy against float64, at the size of a real latent, and its clipped objective."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from ngrpo_lora import auto_temperature, clipped_objective, leaping_log_ratio, leaping_logits, neighbor_noise
from ngrpo_lora.equations.surrogate import leap, mean_squared_distances

GROUP, DIMS = 6, 262_144  # 16 channels of 128 x 128: 1024 px


def reference_log_ratio(candidates: Tensor, anchor_old: Tensor, displacement: Tensor, temperature: float) -> Tensor:
    """Eq. 8 and 10 word for word in float64, which resolves a distance of 5e4 to 1e-11."""
    candidates, old, displacement = (x.double() for x in (candidates, anchor_old, displacement))
    log_policy = [
        torch.log_softmax(-(candidates - anchor).flatten(1).square().sum(1) / temperature, 0)
        for anchor in (old, old + displacement)
    ]
    return log_policy[1] - log_policy[0]


def naive_log_ratio(candidates: Tensor, anchor_old: Tensor, displacement: Tensor, temperature: float) -> Tensor:
    """The same in float32: two distances subtracted."""
    log_policy = [
        torch.log_softmax(-(candidates - anchor).square().sum(1) / temperature, 0)
        for anchor in (anchor_old, anchor_old + displacement)
    ]
    return log_policy[1] - log_policy[0]


def neighbors() -> tuple[Tensor, Tensor]:
    """Candidates of radius 0.3, and the first one's one-step transition, which lies near it but not on it."""
    generator = torch.Generator().manual_seed(0)
    base, deltas, mismatch = (torch.randn(*n, DIMS, generator=generator) for n in ((), (GROUP,), ()))
    candidates = neighbor_noise(base, deltas, 0.3)
    return candidates, candidates[0] + 1e-3 * mismatch


def equal_distances() -> tuple[Tensor, Tensor]:
    """Candidates that all lie at a squared distance of 5e4 from the old anchor."""
    generator = torch.Generator().manual_seed(1)
    anchor, directions = torch.randn(DIMS, generator=generator), torch.randn(GROUP, DIMS, generator=generator)
    return anchor + directions * (5e4**0.5 / directions.norm(dim=1, keepdim=True)), anchor


GEOMETRIES = {"neighbors": neighbors(), "equal_distances": equal_distances()}


def displacement_for(candidates: Tensor, anchor: Tensor, temperature: float, largest: float) -> Tensor:
    """A displacement of which the largest |log ratio| is `largest`: towards some candidates, and sideways."""
    generator = torch.Generator().manual_seed(2)
    mixture = torch.randn(GROUP, generator=generator) @ (candidates - anchor)
    direction = mixture / mixture.norm() + torch.randn(DIMS, generator=generator) / DIMS**0.5
    offsets, size = (candidates - anchor).double(), 1e-9
    old, dots = -offsets.square().sum(1) / temperature, offsets @ direction.double()
    for _ in range(8):  # secant steps: the log ratio is nearly linear in the size
        new = old + 2 * size * dots / temperature
        size *= largest / (new.log_softmax(0) - old.log_softmax(0)).abs().max().item()
    return size * direction


# The log ratio ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("largest", [1e-4, 3e-3, 1.0, 30.0])
@pytest.mark.parametrize("temperature", [1.0, "auto"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_log_ratio_agrees_with_float64_at_262144_dimensions(
    geometry: str, temperature: float | str, largest: float, device: str
):
    candidates, anchor = GEOMETRIES[geometry]
    tau = auto_temperature(candidates) if temperature == "auto" else float(temperature)
    displacement = displacement_for(candidates, anchor, tau, largest)
    expected = reference_log_ratio(candidates, anchor, displacement, tau)
    assert expected.abs().max().item() == pytest.approx(largest, rel=0.2)
    there = [x.to(device)[None] for x in (candidates, anchor, displacement)]
    found = leap(*there, tau if temperature != "auto" else mean_squared_distances(there[0])).log_ratio[0]
    torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=1e-5)


def test_every_distance_5e4_and_a_true_log_ratio_of_1e_4_is_what_float32_distances_cannot_see():
    candidates, anchor = GEOMETRIES["equal_distances"]
    distances = -leaping_logits(candidates, anchor, 1.0)
    torch.testing.assert_close(distances, torch.full((GROUP,), 5e4, dtype=torch.float64), rtol=1e-5, atol=0)
    displacement = displacement_for(candidates, anchor, 1.0, 1e-4)
    expected = reference_log_ratio(candidates, anchor, displacement, 1.0)
    assert (naive_log_ratio(candidates, anchor, displacement, 1.0) - expected).abs().max() > 5e-5
    found = leaping_log_ratio(candidates, anchor, displacement, 1.0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 100.0, 1e5])
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_an_anchor_that_jumps_to_another_candidate_agrees_with_float64(
    geometry: str, factor: float, temperature: float
):
    """At temperature 1 this moves log probabilities by 5e4, where every exponential overflows."""
    candidates, anchor = GEOMETRIES[geometry]
    displacement = factor * (candidates[3] - anchor)
    expected = reference_log_ratio(candidates, anchor, displacement, temperature)
    found = leaping_log_ratio(candidates, anchor, displacement, temperature)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e5])
def test_a_huge_displacement_stays_finite_with_a_finite_gradient(temperature: float):
    candidates, anchor = GEOMETRIES["neighbors"]
    displacement = (1e6 * torch.ones(DIMS)).requires_grad_()
    log_ratio = leaping_log_ratio(candidates, anchor, displacement, temperature)
    log_ratio.sum().backward()
    assert log_ratio.isfinite().all()
    assert displacement.grad is not None
    assert displacement.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_an_anchor_that_stays_has_a_log_ratio_of_exactly_0(geometry: str, temperature: float):
    candidates, anchor = GEOMETRIES[geometry]
    log_ratio = leaping_log_ratio(candidates, anchor, torch.zeros(DIMS), temperature)
    assert torch.equal(log_ratio, torch.zeros(GROUP, dtype=torch.float64))


def test_the_new_policy_sums_to_1():
    candidates, anchor = torch.randn(GROUP, 3, 4), torch.randn(3, 4)
    one = (x[None] for x in (candidates, anchor, 0.3 * torch.randn(3, 4)))
    log_ratio, log_old = (values[0] for values in leap(*one, 5.0))
    policy = torch.softmax(leaping_logits(candidates, anchor, 5.0), 0)
    torch.testing.assert_close(log_old.exp(), policy)
    assert (policy * log_ratio.exp()).sum().item() == pytest.approx(1, abs=1e-12)


def test_logits_on_numbers():
    candidates = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    expected = torch.tensor([-2 / 4, -13 / 4, 0], dtype=torch.float64)
    torch.testing.assert_close(leaping_logits(candidates, torch.tensor([1.0, 1.0]), 4.0), expected)


def test_equal_distances_give_a_uniform_policy():
    candidates = torch.cat([torch.eye(4), -torch.eye(4)])
    policy = torch.softmax(leaping_logits(candidates, torch.zeros(4), 0.1), 0)
    assert torch.equal(policy, torch.full((8,), 1 / 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("candidates", "anchor", "displacement"),
    [((4,), (), ()), ((4, 3), (4,), (4,)), ((4, 3), (3,), (1,)), ((4, 3), (3,), ()), ((4, 3), (1, 3), (1, 3))],
)
def test_shapes_that_do_not_agree_are_an_error(candidates: tuple, anchor: tuple, displacement: tuple):
    with pytest.raises(ValueError, match=r"candidates must be \(G, \.\.\.\)"):
        leaping_log_ratio(torch.zeros(candidates), torch.zeros(anchor), torch.zeros(displacement), 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_and_finite_is_an_error(temperature: float):
    with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
        leaping_log_ratio(torch.zeros(4, 3), torch.zeros(3), torch.zeros(3), temperature)
    with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
        leaping_logits(torch.zeros(4, 3), torch.zeros(3), temperature)


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (4,)])
def test_a_temperature_of_fewer_than_two_candidates_is_an_error(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"candidates must be \(G >= 2, \.\.\.\), got "):
        auto_temperature(torch.zeros(shape))


@pytest.mark.parametrize("clip_range", [0.0, -0.1, math.nan])
def test_a_clip_range_that_is_not_positive_is_an_error(clip_range: float):
    with pytest.raises(ValueError, match=f"clip_range must be positive, got {clip_range}"):
        clipped_objective(torch.zeros(4), torch.ones(4), clip_range)


def test_a_policy_that_is_certain_of_its_anchor_still_has_ratios_and_a_gradient():
    """With a summed distance and temperature 1 all other candidates have probability 0 in any floating point."""
    candidates, anchor = GEOMETRIES["neighbors"]
    policy = torch.softmax(leaping_logits(candidates, anchor, 1.0), 0)
    assert policy.tolist() == [1.0] + [0.0] * (GROUP - 1)
    displacement = displacement_for(candidates, anchor, 1.0, 30.0).requires_grad_()
    advantages = torch.tensor([1.5, -0.5, 0.25, -1.0, 0.0, -0.25], dtype=torch.float64)
    log_ratio = leaping_log_ratio(candidates, anchor, displacement, 1.0)
    objective, _ = clipped_objective(log_ratio, advantages, 0.2)
    objective.backward()
    assert log_ratio[0].item() == pytest.approx(0, abs=1e-9)
    assert objective.isfinite()
    assert displacement.grad is not None
    assert displacement.grad.isfinite().all()
    assert displacement.grad.norm() > 0


# The objective ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, "auto"])
def test_unchanged_weights_give_ratio_1_no_clip_and_the_closed_form_gradient(temperature: float | str):
    """At rho = 1 the gradient over the displacement is `(2 / tau) * sum_i A_i d_i`, whatever the policy."""
    candidates, anchor = GEOMETRIES["neighbors"]
    tau = auto_temperature(candidates) if temperature == "auto" else float(temperature)
    advantages = torch.tensor([1.5, -0.5, 0.25, -1.0, 0.0, -0.25], dtype=torch.float64)
    displacement = torch.zeros(DIMS, requires_grad=True)
    objective, held = clipped_objective(leaping_log_ratio(candidates, anchor, displacement, tau), advantages, 1e-4)
    objective.backward()
    assert objective.item() == 0
    assert not held.any()
    expected = (2 / tau) * (advantages @ (candidates - anchor).double())
    assert displacement.grad is not None
    torch.testing.assert_close(displacement.grad.double() * tau, expected * tau, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_advantages_that_do_not_cancel_is_taken_from_the_mean_candidate():
    """In general it is `(2 / tau) * sum_i A_i (d_i - sum_k pi_k d_k)`."""
    candidates, anchor, advantages = torch.randn(5, 7), torch.randn(7), torch.randn(5, dtype=torch.float64)
    displacement = torch.zeros(7, requires_grad=True)
    clipped_objective(leaping_log_ratio(candidates, anchor, displacement, 3.0), advantages, 0.2)[0].backward()
    offsets = (candidates - anchor).double()
    policy = torch.softmax(leaping_logits(candidates, anchor, 3.0), 0)
    expected = (2 / 3.0) * (advantages @ (offsets - policy @ offsets))
    assert displacement.grad is not None
    torch.testing.assert_close(displacement.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chosen", range(4))
def test_a_positive_advantage_pulls_its_candidate_nearer(chosen: int):
    candidates, anchor = torch.eye(4), torch.zeros(4)
    advantages = torch.full((4,), -1 / 3, dtype=torch.float64)
    advantages[chosen] = 1.0
    displacement = torch.zeros(4, requires_grad=True)
    clipped_objective(leaping_log_ratio(candidates, anchor, displacement, 1.0), advantages, 0.2)[0].backward()
    assert displacement.grad is not None
    moved = 0.01 * displacement.grad
    log_ratio = leaping_log_ratio(candidates, anchor, moved, 1.0)
    assert log_ratio[chosen] > 0
    assert (log_ratio[torch.arange(4) != chosen] < 0).all()
    assert (candidates[chosen] - moved).norm() < (candidates[chosen] - anchor).norm()


def test_the_clip_holds_back_only_what_would_be_exploited():
    """A gain beyond 1 + eps and a loss below 1 - eps are held; a change for the worse never is."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 0.9, 1.5], dtype=torch.float64)
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0, -2.0, 0.0], dtype=torch.float64)
    log_ratio = ratio.log().requires_grad_()
    objective, held = clipped_objective(log_ratio, advantages, 0.2)
    terms = [2 * 1.2, 2 * 0.5, -2 * 1.5, -2 * 0.8, 2 * 1.1, -2 * 0.9, 0.0]
    assert objective.item() == pytest.approx(sum(terms), abs=1e-12)
    assert held.tolist() == [True, False, False, True, False, False, False]
    objective.backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, torch.where(held, 0.0, advantages * ratio))


# The temperature ----------------------------------------------------------------------------------------------------


def test_auto_temperature_is_the_mean_squared_distance_of_all_pairs():
    candidates = 3 + torch.randn(7, 4, 5)
    distances = [(a - b).double().square().sum().item() for a, b in combinations(candidates, 2)]
    assert auto_temperature(candidates) == pytest.approx(sum(distances) / len(distances), rel=1e-6)
    broken = torch.cat([torch.full((1, 4, 5), torch.nan), candidates])
    assert auto_temperature(broken) == pytest.approx(auto_temperature(candidates), rel=1e-14)
    groups = torch.stack([broken, 2 * broken, torch.randn(8, 4, 5)])
    expected = [auto_temperature(group) for group in groups]
    assert mean_squared_distances(groups).tolist() == pytest.approx(expected, rel=1e-14)


def test_auto_temperature_keeps_logits_of_order_1_at_262144_dimensions():
    candidates, anchor = GEOMETRIES["neighbors"]
    logits = leaping_logits(candidates, anchor, auto_temperature(candidates))
    torch.testing.assert_close(logits[1:], -torch.ones(GROUP - 1, dtype=torch.float64), rtol=0, atol=0.02)


def test_a_ratio_beyond_floating_point_leaves_every_gradient_finite():
    log_ratio = torch.tensor([900.0, -900.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([-1.0, 1.0, 2.0, -2.0], dtype=torch.float64)
    objective, _ = clipped_objective(log_ratio, advantages, 0.2)
    objective.backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad[1:], torch.tensor([0.0, 2.0, -2.0 * math.exp(0.5)]).double())
    assert log_ratio.grad[0] == 0
    assert objective.isfinite()
