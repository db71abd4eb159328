"""DiffusionNFT's weights and loss; how it draws is in test_forward.py."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from flows import SHAPE, algorithm_of, last_metrics, run_config, schedule_of, velocity_fn

from ngrpo_lora.config import RolloutConfig, load_config
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.types import RewardBatch, Rollout, Transition, Velocities

STEPS, GROUP = 6, 5
ROLLOUT = RolloutConfig(num_steps=STEPS, group_size=GROUP)


def make(**settings: Any) -> tuple[Any, Rollout]:
    algorithm = algorithm_of("nft", ROLLOUT, **settings)
    (rollout,) = algorithm.rollout(velocity_fn, schedule_of(STEPS), SHAPE, [0], 0)
    return algorithm, rollout


def test_it_is_trained_at_the_schedules_levels_but_the_last():
    _, rollout = make()
    assert torch.equal(rollout.sigmas, schedule_of(STEPS).sigmas[: STEPS - 1])


def test_advantages_have_the_deviation_of_all_rewards():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [10.0, 10.0, 13.0], [4.0, 4.0, 4.0]])
    found = make()[0].advantages(RewardBatch(rewards, torch.ones(3, 3, dtype=torch.bool), {}))
    deviation = rewards.double().std(correction=0)
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, -1.0, 2.0], [0.0, 0.0, 0.0]]).double() / (deviation + 1e-4)
    torch.testing.assert_close(found, expected)


def test_all_samples_of_groups_with_advantages_are_dealt_out():
    advantages = torch.ones(3, GROUP)
    advantages[1] = 0
    algorithm, _ = make(num_train_steps=2, updates_per_rollout=2)
    updates = algorithm.updates(advantages, seed=0, iteration=0)
    assert [len(update) for update in updates] == [GROUP * 2] * 2
    owners = Counter((t.group, t.sample) for update in updates for t in update)
    assert owners.keys() == {(g, s) for g in (0, 2) for s in range(GROUP)}
    assert set(owners.values()) == {2}


@pytest.mark.parametrize("mixture", [1.0, 0.1])
@pytest.mark.parametrize("advantage", [-7.0, -1.5, 0.0, 2.0])
def test_the_loss_and_its_gradient_are_the_published_ones(mixture: float, advantage: float):
    algorithm, rollout = make(mixture=mixture, reference_weight=0.3)
    advantages = torch.full((GROUP,), advantage).double().clamp(-5, 5)
    old = velocity_fn(rollout.latents[2, 1], rollout.sigmas[2].item())
    current = (old + 0.1 * torch.randn(SHAPE)).requires_grad_()
    base = old + 0.2
    loss, metrics = algorithm.loss(rollout, advantages, Transition(0, 1, 2), Velocities(current, old, base))
    (gradient,) = torch.autograd.grad(loss, current)

    v = current.detach().double().requires_grad_()
    t, x0, xt = rollout.sigmas[2].double(), rollout.final[1].double(), rollout.latents[2, 1].double()
    r = min(max(advantage / 10 + 0.5, 0.0), 1.0)
    terms, errors = [], []
    for weight, implied in (
        (r, mixture * v + (1 - mixture) * old.double()),
        (1 - r, (1 + mixture) * old.double() - mixture * v),
    ):
        error = xt - t * implied - x0
        errors.append(error.square().mean().item())
        terms.append(weight * (error.square() / error.abs().mean().clamp(min=1e-5).detach()).mean())
    expected = 5 / mixture * (terms[0] + terms[1]) + 0.3 * (v - base.double()).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, v)[0], rtol=1e-4, atol=1e-8)
    assert list(metrics.values()) == pytest.approx(errors, rel=1e-5)


def test_a_good_sample_pulls_and_a_bad_one_pushes():
    algorithm, rollout = make(reference_weight=0.0)
    latents, sigma, clean = rollout.latents[1, 0], rollout.sigmas[1].item(), rollout.final[0]
    towards = (latents - clean) / sigma  # the velocity that leads to this very sample
    old = towards + 0.3
    for advantage, sign in ((5.0, 1), (-5.0, -1)):
        current = old.clone().requires_grad_()
        advantages = torch.full((GROUP,), advantage).double()
        loss, _ = algorithm.loss(rollout, advantages, Transition(0, 0, 1), Velocities(current, old))
        (gradient,) = torch.autograd.grad(loss, current)
        assert math.copysign(1, (gradient * (old - towards)).sum().item()) == sign


def test_a_run_costs_its_steps_and_one_pass_a_level(make_config: MakeConfig, tmp_path: Path):
    """The reference and the old velocities of the second update are passes of their own."""
    from ngrpo_lora.training.setup import prepare
    from ngrpo_lora.training.trainer import complete

    settings = ["rollout.num_steps=4", "trainer.num_iterations=1", "evaluation.num_prompts=1"]
    complete(prepare(run_config(make_config, tmp_path, "nft", *settings, "algorithm.reference_weight=0")))
    row = last_metrics(tmp_path)
    assert row["nfe/old_per_sample"] == 4
    assert row["nfe/theta_per_sample"] == 3
    assert row["policy/positive_error"] == row["policy/negative_error"] > 0  # at unchanged weights
    assert row["lora/grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["algorithm.num_train_steps=8"], "algorithm.num_train_steps must be less than rollout.num_steps .8.*got 8"),
        (["algorithm.updates_per_rollout=97"], "at most the samples of an iteration .96., got 97"),
        (["algorithm.clip_range=1e-4"], "unknown key algorithm.clip_range"),
        (["algorithm.mixture=0"], "algorithm.mixture must be more than 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["algorithm=nft", "rollout.num_steps=8", *settings])
