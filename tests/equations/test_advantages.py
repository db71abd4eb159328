"""Group advantages: Eq. 3 at p = 2, and what the quasi-norm and the masks leave unchanged."""

from __future__ import annotations

import math

import pytest
import torch

from ngrpo_lora import group_advantages

ALL_P = [2.0, 1.5, 1.0, 0.5, 0.1]


def random_rewards(groups: int = 5, size: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(groups, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_p_2_is_standardisation_by_the_population_deviation():
    rewards = random_rewards()
    expected = (rewards - rewards.mean(1, True)) / rewards.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards), expected)


@pytest.mark.parametrize(("p", "divisor"), [(2.0, math.sqrt(3)), (1.0, 3.0), (0.5, (math.sqrt(3) + 3) ** 2 / 2)])
def test_quasi_norm_on_numbers(p: float, divisor: float):
    """Centred to -3, 1, 1, 1, whose p-norms are sqrt(12), 6 and (sqrt(3) + 3)^2; each over sqrt(G) = 2."""
    expected = torch.tensor([[-3.0, 1.0, 1.0, 1.0]], dtype=torch.float64) / divisor
    torch.testing.assert_close(group_advantages(torch.tensor([[1.0, 5.0, 5.0, 5.0]]), p), expected)


@pytest.mark.parametrize("p", ALL_P)
def test_the_quasi_norm_of_the_advantages_is_sqrt_g(p: float):
    advantages = group_advantages(random_rewards(), p)
    torch.testing.assert_close(
        advantages.abs().pow(p).sum(1).pow(1 / p), torch.full((5,), math.sqrt(12), dtype=torch.float64)
    )


def test_a_smaller_p_mutes_flat_groups_more_than_peaked_ones():
    """What Eq. 11 is for: one outlier keeps its advantage, a group without one loses it."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]])
    muted = group_advantages(rewards, 0.5).norm(dim=1) / group_advantages(rewards, 2.0).norm(dim=1)
    assert muted[1] < muted[0] < 1


@pytest.mark.parametrize("p", ALL_P)
def test_advantages_sum_to_0_and_keep_sign_and_order(p: float):
    rewards = random_rewards()
    advantages = group_advantages(rewards, p)
    assert advantages.sum(1).abs().max() < 1e-12
    assert torch.equal(advantages.sign(), (rewards - rewards.mean(1, True)).sign())
    assert torch.equal(advantages.argsort(1), rewards.argsort(1))


@pytest.mark.parametrize("p", ALL_P)
@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e4, 1e30, 1e200])
def test_scale_and_shift_of_the_rewards_do_not_matter(scale: float, p: float):
    rewards = random_rewards()
    torch.testing.assert_close(group_advantages(rewards * scale, p), group_advantages(rewards, p))
    torch.testing.assert_close(group_advantages((rewards + 3) * scale, p), group_advantages(rewards, p))


def test_without_a_norm_centred_rewards_keep_their_scale():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.1, 0.1, 0.1], [0.0, 0.2, 0.4]])
    valid = torch.tensor([[True, True, True], [True, True, True], [False, True, True]])
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0], [0.0, -0.1, 0.1]])
    torch.testing.assert_close(group_advantages(rewards, None, valid), expected.double(), rtol=0, atol=1e-7)
    muted = group_advantages(rewards, None, valid, min_spread=0.5)
    assert muted[0].any()
    assert not muted[2].any()


def test_groups_do_not_see_each_other():
    rewards = random_rewards()
    for group in range(5):
        assert torch.equal(group_advantages(rewards[group : group + 1])[0], group_advantages(rewards)[group])


@pytest.mark.parametrize("p", ALL_P)
@pytest.mark.parametrize("value", [97.1, 0.1, 0.0, -1e30, 1e-30])
@pytest.mark.parametrize("size", [2, 3, 7, 12])
def test_equal_rewards_give_exactly_0(size: int, value: float, p: float):
    """The mean of seven 97.1 is not 97.1 in floating point: equality must be read from the spread."""
    for dtype in (torch.float32, torch.float64):
        advantages = group_advantages(torch.full((1, size), value, dtype=dtype), p)
        assert torch.equal(advantages, torch.zeros(1, size, dtype=torch.float64))


def test_a_failed_reward_gets_0_and_does_not_count():
    rewards = torch.tensor([[1.0, 2.0, math.nan, 4.0], [5.0, 1e9, 6.0, 7.0]])
    valid = torch.tensor([[True, True, False, True], [True, False, True, True]])
    advantages = group_advantages(rewards, 1.5, valid)
    assert torch.equal(advantages == 0, ~valid | torch.tensor([[False] * 4, [False, False, True, False]]))
    kept = torch.tensor([[1.0, 2.0, 4.0], [5.0, 6.0, 7.0]])
    torch.testing.assert_close(advantages[valid].view(2, 3), group_advantages(kept, 1.5))


@pytest.mark.parametrize("num_valid", [0, 1])
def test_a_group_with_fewer_than_two_valid_rewards_gets_0(num_valid: int):
    valid = torch.arange(4)[None] < num_valid
    rewards = torch.tensor([[3.0, math.nan, math.inf, math.nan]])
    assert torch.equal(group_advantages(rewards, valid=valid), torch.zeros(1, 4, dtype=torch.float64))


def test_a_group_within_the_minimum_spread_gets_0():
    rewards = torch.tensor([[0.0, 0.5, 0.25], [0.0, 0.501, 0.25]])
    advantages = group_advantages(rewards, min_spread=0.5)
    assert torch.equal(advantages[0], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(advantages[1], group_advantages(rewards)[1])


@pytest.mark.parametrize("shape", [(4,), (2, 1), (2, 3, 4)])
def test_a_shape_other_than_groups_of_two_or_more_is_an_error(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"rewards must be finite and \(P, G >= 2\)"):
        group_advantages(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_valid_reward_that_is_not_finite_is_an_error(value: float):
    with pytest.raises(ValueError, match="rewards must be finite"):
        group_advantages(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("min_spread", [-1.0, math.nan])
def test_a_spread_below_0_is_an_error(min_spread: float):
    with pytest.raises(ValueError, match=f"min_spread must be 0 or more, got {min_spread}"):
        group_advantages(random_rewards(), min_spread=min_spread)


@pytest.mark.parametrize("p", [0.0, -1.0, 2.001, math.nan])
def test_p_outside_0_to_2_is_an_error(p: float):
    with pytest.raises(ValueError, match=rf"p must be in \(0, 2\], got {p}"):
        group_advantages(random_rewards(), p)
