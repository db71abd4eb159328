"""Which samples best-of-N trains on, where, and with what loss; how it draws is in test_forward.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from flows import SHAPE, algorithm_of, last_metrics, run_config, schedule_of, velocity_fn

from ngrpo_lora.config import RolloutConfig, load_config
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import flow_sigmas
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.types import RewardBatch, Transition, Velocities

STEPS, GROUP = 6, 4
ROLLOUT = RolloutConfig(num_steps=STEPS, group_size=GROUP)


def make(**settings: Any) -> Any:
    return algorithm_of("best_of_n", ROLLOUT, **settings)


def test_the_best_of_each_group_are_chosen_and_failed_or_flat_ones_never():
    rewards = torch.tensor([[0.0, 3.0, 2.0, 99.0], [1.0, 1.0, 1.0, 1.0], [0.5, 0.1, 0.2, 0.4]])
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[0, 3] = False
    batch = RewardBatch(rewards, valid, {})
    one = [[0.0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert torch.equal(make().advantages(batch), torch.tensor(one).double())
    two = [[0.0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert torch.equal(make(num_best=2).advantages(batch), torch.tensor(two).double())
    valid[0, 1:3] = False  # one is left, and nothing to compare it with
    assert not make().advantages(RewardBatch(rewards, valid, {}))[0].any()


def test_the_chosen_are_dealt_out_with_all_their_levels():
    advantages = torch.zeros(4, GROUP)
    advantages[[0, 1, 3], [2, 0, 1]] = 1
    updates = make(num_train_steps=3, updates_per_rollout=2).updates(advantages, seed=0, iteration=0)
    assert sorted(map(len, updates)) == [3, 6]
    counts = Counter((t.group, t.sample) for update in updates for t in update)
    assert counts == {(0, 2): 3, (1, 0): 3, (3, 1): 3}


def test_uniform_levels_are_one_from_each_part_of_the_schedule():
    schedule, algorithm = Schedule(flow_sigmas(STEPS, 1.0), 1.0), make(num_train_steps=5)
    levels = torch.stack([algorithm.levels(schedule, seed) for seed in range(400)])
    assert ((levels * 5).ceil() == torch.arange(1, 6)).all()
    assert levels.mean().item() == pytest.approx(0.5, abs=0.01)
    time = make(num_train_steps=5).levels(schedule_of(STEPS, 3.0), 0) / 3
    time = time * 3 / (3 - 2 * 3 * time)  # the inverse of the shift
    torch.testing.assert_close(time, levels[0], rtol=1e-5, atol=1e-6)


def test_logit_normal_levels_have_their_median_in_the_middle():
    schedule, algorithm = Schedule(flow_sigmas(STEPS, 1.0), 1.0), make(num_train_steps=4, levels="logit_normal")
    levels = torch.stack([algorithm.levels(schedule, seed) for seed in range(1000)]).flatten()
    assert levels.logit().mean().item() == pytest.approx(0, abs=0.06)
    assert levels.logit().std().item() == pytest.approx(1, abs=0.04)


def test_the_loss_is_that_of_flow_matching():
    algorithm = make(reference_weight=0.3)
    (rollout,) = algorithm.rollout(velocity_fn, schedule_of(STEPS), SHAPE, [0], 0)
    level, sample = 1, 2
    sigma, clean = rollout.sigmas[level], rollout.final[sample]
    fresh = (rollout.latents[level, sample] - (1 - sigma) * clean) / sigma
    current = torch.randn(SHAPE).requires_grad_()
    base = torch.randn(SHAPE)
    loss, metrics = algorithm.loss(
        rollout, torch.ones(GROUP), Transition(0, sample, level), Velocities(current, None, base)
    )
    matching = (current - (fresh - clean)).square().mean()
    expected = matching + 0.3 * (current - base).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics == {"policy/flow_matching_error": pytest.approx(matching.item(), rel=1e-5)}
    (gradient,) = torch.autograd.grad(loss, current, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, current)[0], rtol=1e-4, atol=1e-6)


def test_a_run_costs_its_steps_and_what_it_keeps(make_config: MakeConfig, tmp_path: Path):
    from ngrpo_lora.training.setup import prepare
    from ngrpo_lora.training.trainer import complete

    settings = ["rollout.num_steps=4", "trainer.num_iterations=1", "evaluation.num_prompts=1"]
    complete(prepare(run_config(make_config, tmp_path, "best_of_n", *settings, "algorithm.num_train_steps=3")))
    row = last_metrics(tmp_path)
    assert row["nfe/old_per_sample"] == 4
    assert row["nfe/theta_per_sample"] == 3 / 4  # three levels of one in four
    assert row["lora/grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["algorithm.num_best=12"], "algorithm.num_best must be less than rollout.group_size .12., got 12"),
        (["algorithm.updates_per_rollout=9"], "at most the best samples of an iteration .8., got 9; lower it"),
        (["algorithm.levels=beta"], "algorithm.levels must be .uniform. or .logit_normal., got .beta."),
    ],
)
def test_what_does_not_fit_is_refused_in_words(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["algorithm=best_of_n", *settings])
