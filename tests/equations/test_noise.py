"""Neighbour noises keep mean 0 and variance 1; seeds mean the same in every process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ngrpo_lora import derive_seed, gaussian_noise, neighbor_noise

SIZE = 100_000
FIVE_SIGMA = 5 / math.sqrt(SIZE)


def standard_normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_neighbor_noise_is_the_formula_on_numbers():
    base, deltas = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.0], [-1.0, 5.0], [0.0, 0.0]])
    expected = torch.tensor([[2.2, -0.8], [1.0, 2.2], [1.6, -0.8]])  # 0.8 * base + 0.6 * delta
    torch.testing.assert_close(neighbor_noise(base, deltas, 0.6), expected)


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.5, 1.0])
def test_neighbors_keep_mean_0_and_variance_1(strength: float):
    noise = neighbor_noise(standard_normal(SIZE, seed=0), standard_normal(4, SIZE, seed=1), strength)
    assert noise.mean(1).abs().max() < FIVE_SIGMA
    assert (noise.var(1) - 1).abs().max() < FIVE_SIGMA * math.sqrt(2)


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.5, 1.0])
def test_neighbors_correlate_by_1_minus_r_squared(strength: float):
    base = standard_normal(SIZE, seed=2)
    noise = neighbor_noise(base, standard_normal(3, SIZE, seed=3), strength)
    correlation = torch.corrcoef(torch.cat([base[None], noise]))
    for i in range(1, 4):
        assert correlation[0, i].item() == pytest.approx(math.sqrt(1 - strength**2), abs=FIVE_SIGMA)
        for j in range(1, i):
            assert correlation[i, j].item() == pytest.approx(1 - strength**2, abs=FIVE_SIGMA)


def test_radius_1_does_not_depend_on_the_base():
    deltas = torch.randn(3, 16, 8, 8)
    assert torch.equal(neighbor_noise(torch.randn(16, 8, 8) * 100, deltas, 1.0), deltas)


@pytest.mark.parametrize("strength", [0.0, -0.3, 1.0001, math.inf, math.nan])
def test_a_radius_outside_0_to_1_is_an_error_that_shows_it(strength: float):
    with pytest.raises(ValueError, match=rf"perturbation_strength must be in \(0, 1\], got {strength}"):
        neighbor_noise(torch.zeros(2), torch.zeros(3, 2), strength)


@pytest.mark.parametrize(("base", "deltas"), [((4,), (4,)), ((4,), (3, 5)), ((4, 1), (3, 4)), ((1,), (3, 4))])
def test_shapes_that_would_broadcast_are_an_error(base: tuple[int, ...], deltas: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"deltas must be \(G, \*base.shape\)"):
        neighbor_noise(torch.zeros(base), torch.zeros(deltas), 0.3)


def test_seeds_are_pinned_so_that_a_run_can_be_repeated_elsewhere():
    assert derive_seed() == int.from_bytes(bytes.fromhex("e3b0c44298fc1c14"), "big") >> 1  # SHA-256 of nothing
    assert derive_seed(0, "rollout", 3, 7) == 966_360_757_454_419_455
    assert derive_seed("0", "rollout", "3", "7") == derive_seed(0, "rollout", 3, 7)


def test_seeds_tell_labels_apart_and_fit_a_generator():
    labels = [("a", "bc"), ("ab", "c"), ("abc",), ("a", "b", "c"), (1, 23), (12, 3), (123,), ("delta", 0), ("delta", 1)]
    seeds = [derive_seed(*label) for label in labels]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_gaussian_noise_is_pinned():
    torch.testing.assert_close(
        gaussian_noise((2, 2), 0), torch.tensor([[1.5409961, -0.2934289], [-2.1787894, 0.5684313]]), rtol=0, atol=1e-6
    )
    assert gaussian_noise((3,), 0).dtype == torch.float32


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63)])
def test_every_seed_that_a_generator_takes_may_be_numpys(seed: int):
    expected = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    number = np.uint64(seed) if seed >= 2**63 else np.int64(seed)
    assert torch.equal(gaussian_noise((3,), number), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_a_seed_beyond_generators_is_an_error(seed: int):
    with pytest.raises(ValueError, match=rf"seed must be from -2\*\*63 to 2\*\*64 - 1, got {seed}"):
        gaussian_noise((3,), seed)


def test_gaussian_noise_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(1)
    first, state = gaussian_noise((64,), 5), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(gaussian_noise((64,), 5), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_gaussian_noise_does_not_depend_on_torchs_defaults():
    expected = gaussian_noise((64,), 5)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = gaussian_noise((64,), 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_gaussian_noise_of_two_seeds_is_independent():
    pair = torch.stack([gaussian_noise((SIZE,), seed) for seed in (derive_seed("delta", 0), derive_seed("delta", 1))])
    assert abs(torch.corrcoef(pair)[0, 1].item()) < FIVE_SIGMA
