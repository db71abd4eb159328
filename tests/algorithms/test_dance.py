"""DanceGRPO's own decisions; what it shares with the other SDE baselines is in test_sde.py."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from flows import SHAPE, Counted, algorithm_of, schedule_of, velocity_fn

from ngrpo_lora.config import RolloutConfig, load_config
from ngrpo_lora.errors import ConfigError


def test_with_the_papers_25_steps_it_costs_25_and_14():
    rollout = RolloutConfig(num_steps=25, group_size=12)
    algorithm, counted = algorithm_of("dance", rollout), Counted()
    algorithm.rollout(counted, schedule_of(25), SHAPE, [0], 0)
    assert counted.evaluations / 12 == 25
    updates = algorithm.updates(torch.ones(2, 12), seed=0, iteration=0)
    assert sum(map(len, updates)) / 24 == 14


def test_a_random_share_of_the_steps_but_the_last_is_trained():
    algorithm = algorithm_of("dance", RolloutConfig(num_steps=16, group_size=4))
    updates = algorithm.updates(torch.ones(60, 4), seed=0, iteration=0)
    transitions = [t for update in updates for t in update]
    assert set(Counter((t.group, t.sample) for t in transitions).values()) == {9}
    steps = Counter(t.step for t in transitions)
    assert steps.keys() == set(range(15))
    assert max(steps.values()) / min(steps.values()) < 1.4
    assert [len(update) for update in updates] == [120 * 9] * 2


def test_the_picture_is_the_clean_prediction_of_the_last_step():
    (rollout,) = algorithm_of("dance", RolloutConfig(num_steps=6, group_size=3)).rollout(
        velocity_fn, schedule_of(6), SHAPE, [0], 0
    )
    last, sigma = rollout.latents[-1], schedule_of(6).sigmas[-2].item()
    torch.testing.assert_close(rollout.final, last - sigma * velocity_fn(last, sigma), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["algorithm.train_share=0.1"],
            "train_share must be at least 0.143 with rollout.num_steps=8, .* got 0.1; raise it",
        ),
        (["algorithm.window_size=4"], "unknown key algorithm.window_size"),
        (["algorithm.updates_per_rollout=97"], "at most the samples of an iteration .96., got 97"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["algorithm=dance", "rollout.num_steps=8", *settings])
