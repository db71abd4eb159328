"""What MixGRPO-Flash does after its window; the rest is in test_mix.py and test_sde.py."""

from __future__ import annotations

import pytest
import torch
from flows import SHAPE, Counted, algorithm_of, schedule_of, velocity_fn

from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.equations.solvers import dpmpp_2m_step, pairs

ROLLOUT = RolloutConfig(num_steps=25, group_size=12)


def test_flash_star_costs_8_and_flash_more_the_farther_its_window_is():
    """Over 300 iterations Flash costs 16.2 on average; 15.6 is published."""

    def cost(iteration: int, **settings: object) -> float:
        counted = Counted()
        algorithm_of("mix_flash", ROLLOUT, **settings).rollout(counted, schedule_of(25), SHAPE, [0], iteration)
        return counted.evaluations / 12

    assert cost(299, window="frozen", rest_ratio=0.2) == 8
    costs = [cost(iteration) for iteration in range(0, 300, 20)]
    assert costs[:3] == [4 + 8, 5 + 8, 6 + 7]
    assert sum(costs) / len(costs) == pytest.approx(16.2)


def test_the_rest_is_dpmpp_2m_whose_history_begins_in_the_window():
    algorithm, schedule = algorithm_of("mix_flash", ROLLOUT), schedule_of(25)
    (rollout,) = algorithm.rollout(velocity_fn, schedule, SHAPE, [0], 20 * 6)
    assert torch.equal(rollout.sigmas, schedule.sigmas[6:11])
    sigma = rollout.sigmas[3].item()
    history = (sigma, rollout.latents[3] - sigma * rollout.velocities[3])
    latents = rollout.latents[4]
    for sigma, sigma_next in pairs(schedule.rest(10, 6)):
        clean = latents - sigma * velocity_fn(latents, sigma)
        latents = dpmpp_2m_step(latents, clean, sigma, sigma_next, history)
        history = (sigma, clean)
    torch.testing.assert_close(rollout.final, latents)
