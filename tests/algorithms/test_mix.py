"""MixGRPO's window; what it shares with the other SDE baselines is in test_sde.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from flows import SHAPE, Counted, algorithm_of, schedule_of, velocity_fn

from ngrpo_lora.config import RolloutConfig, load_config
from ngrpo_lora.equations.solvers import euler
from ngrpo_lora.errors import ConfigError

ROLLOUT = RolloutConfig(num_steps=25, group_size=12)


def starts(count: int, **settings: Any) -> list[int]:
    algorithm = algorithm_of("mix", ROLLOUT, **settings)
    return [algorithm.window(iteration).start for iteration in range(count)]


def test_with_the_papers_25_steps_it_costs_25_and_4():
    algorithm, counted = algorithm_of("mix", ROLLOUT), Counted()
    algorithm.rollout(counted, schedule_of(25), SHAPE, [0], 300)
    assert counted.evaluations / 12 == 25
    updates = algorithm.updates(torch.ones(2, 12), seed=0, iteration=300)
    assert sum(map(len, updates)) / 24 == 4
    assert [len(update) for update in updates] == [24] * 4


def test_a_progressive_window_moves_by_a_step_every_25_iterations_and_starts_again():
    assert starts(25 * 43) == [step for step in [*range(21)] * 2 + [0] for _ in range(25)]


def test_a_frozen_window_stays_and_a_random_one_is_anywhere():
    assert set(starts(200, window="frozen")) == {0}
    anywhere = starts(2100, window="random")
    assert anywhere == starts(2100, window="random")
    assert set(anywhere) == set(range(21))
    assert max(Counter(anywhere).values()) < 150


def test_a_decayed_window_leaves_late_steps_ever_sooner():
    stays = Counter(starts(25 * 14 + 22 + 20 + 18 + 16 + 15 + 13 + 12, window="decayed"))
    assert [stays[step] for step in range(21)] == [25] * 14 + [22, 20, 18, 16, 15, 13, 12]
    assert starts(600, window="decayed")[25 * 14 + 22 + 20 + 18 + 16 + 15 + 13 + 12 :][0] == 0


def test_steps_outside_of_the_window_are_eulers():
    algorithm, schedule = algorithm_of("mix", ROLLOUT), schedule_of(25)
    (rollout,) = algorithm.rollout(velocity_fn, schedule, SHAPE, [0], 25 * 6)
    assert torch.equal(rollout.sigmas, schedule.sigmas[6:11])
    noise = algorithm.starts(SHAPE, [0])[0]
    torch.testing.assert_close(rollout.latents[0], euler(velocity_fn, noise, schedule.sigmas[:7])[-1])
    torch.testing.assert_close(rollout.final, euler(velocity_fn, rollout.latents[-1], schedule.sigmas[10:])[-1])
    ode = euler(velocity_fn, rollout.latents[0], schedule.sigmas[6:11])
    assert all((ode[i] - rollout.latents[i]).abs().max() > 1e-3 for i in range(1, 5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["algorithm.window_size=8"],
            "window_size must be at most 7 with rollout.num_steps=8, .* got 8; .* with 9 steps",
        ),
        (
            ["algorithm.window=sliding"],
            "algorithm.window must be .progressive., .random., .decayed. or .frozen., got .sliding.",
        ),
        (["algorithm.rest_ratio=0.4"], "unknown key algorithm.rest_ratio"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["algorithm=mix", "rollout.num_steps=8", *settings])
