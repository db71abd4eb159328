"""What methods of the forward process draw: clean samples by the rollout's solver, noised anew at their levels."""

from __future__ import annotations

import pytest
import torch
from flows import SHAPE, Counted, algorithm_of, schedule_of, velocity_fn

from ngrpo_lora.algorithms._forward import clean_error
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.equations.noise import group_noises
from ngrpo_lora.equations.solvers import SOLVERS

STEPS, GROUP = 6, 5


@pytest.mark.parametrize("method", ["nft", "best_of_n"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler"])
def test_samples_are_the_solvers_own_and_cost_one_evaluation_a_step(method: str, solver: str):
    algorithm = algorithm_of(method, RolloutConfig(num_steps=STEPS, group_size=GROUP, solver=solver))
    schedule, counted = schedule_of(STEPS), Counted()
    (rollout,) = algorithm.rollout(counted, schedule, SHAPE, [3], 0)
    assert counted.evaluations == STEPS * GROUP
    starts = group_noises(SHAPE, [3], GROUP, "start")[0]
    assert torch.equal(rollout.final, SOLVERS[solver](velocity_fn, starts, schedule.sigmas)[-1])


@pytest.mark.parametrize("method", ["nft", "best_of_n"])
def test_trained_latents_are_clean_samples_with_fresh_noise_of_their_level(method: str):
    algorithm = algorithm_of(method, RolloutConfig(num_steps=STEPS, group_size=GROUP))
    (rollout,) = algorithm.rollout(velocity_fn, schedule_of(STEPS), (60, 60), [3], 0)
    assert rollout.latents.shape == (len(rollout.sigmas), GROUP, 60, 60)
    noises = []
    for latents, sigma in zip(rollout.latents, rollout.sigmas.tolist(), strict=True):
        fresh = (latents - (1 - sigma) * rollout.final) / sigma
        assert fresh.flatten(1).mean(1).abs().max() < 0.1
        assert (fresh.flatten(1).std(1) - 1).abs().max() < 0.05
        noises.append(fresh.flatten(1))
    correlation = torch.corrcoef(torch.cat(noises))
    assert correlation[~torch.eye(len(correlation), dtype=torch.bool)].abs().max() < 0.08


@pytest.mark.parametrize("method", ["nft", "best_of_n"])
def test_a_rollout_is_a_function_of_its_seed_and_of_nothing_beside_it(method: str):
    algorithm = algorithm_of(method, RolloutConfig(num_steps=STEPS, group_size=GROUP))
    together = algorithm.rollout(velocity_fn, schedule_of(STEPS), SHAPE, [3, 4], 7)
    for seed, beside in zip((3, 4), together, strict=True):
        (alone,) = algorithm.rollout(velocity_fn, schedule_of(STEPS), SHAPE, [seed], 7)
        assert all(torch.equal(tensor, vars(beside)[name]) for name, tensor in vars(alone).items())
    assert not torch.equal(together[0].final, together[1].final)


def test_the_true_velocity_has_no_error():
    clean, fresh = torch.randn(2, *SHAPE)
    latents = 0.4 * clean + 0.6 * fresh
    assert clean_error(latents, fresh - clean, 0.6, clean).abs().max() < 1e-6
    wrong = clean_error(latents, fresh - clean + 1, 0.6, clean)
    torch.testing.assert_close(wrong, torch.full(SHAPE, -0.6).double(), rtol=1e-5, atol=1e-6)
