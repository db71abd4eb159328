"""Flow-GRPO's four decisions on flows made of a formula, and what it costs in a real run."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from torch import Tensor
from torch.distributions import Normal

from ngrpo_lora import euler, flow_sigmas
from ngrpo_lora.algorithms._sde import SdeRollout
from ngrpo_lora.algorithms.flow_grpo import Algorithm, Config
from ngrpo_lora.config import RolloutConfig, load_config
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.types import RewardBatch, Transition, Velocities

SHAPE = (4, 6, 6)
STEPS, GROUP = 5, 6
SCHEDULE = Schedule(flow_sigmas(STEPS, 3.0), 3.0)
ROLLOUT = RolloutConfig(num_steps=STEPS, group_size=GROUP)


def make(rollout: RolloutConfig = ROLLOUT, **settings: Any) -> Algorithm:
    return Algorithm(Config(**settings), rollout)


def velocity_fn(latents: Tensor, sigma: float) -> Tensor:
    return torch.sin(2 * latents) + sigma * latents


def roll_out(algorithm: Algorithm, seed: int = 0) -> SdeRollout:
    (rollout,) = algorithm.rollout(velocity_fn, SCHEDULE, SHAPE, [seed], 0)
    assert isinstance(rollout, SdeRollout)
    return rollout


# Rollout ------------------------------------------------------------------------------------------------------------


def test_a_rollout_is_a_function_of_its_seed_and_of_nothing_beside_it():
    algorithm = make()
    together = algorithm.rollout(velocity_fn, SCHEDULE, SHAPE, [3, 4], 7)
    for seed, beside in zip((3, 4), together, strict=True):
        alone = roll_out(algorithm, seed)
        assert all(torch.equal(tensor, vars(beside)[name]) for name, tensor in vars(alone).items())
    assert not torch.equal(together[0].final, together[1].final)
    fewer = roll_out(make(RolloutConfig(num_steps=STEPS, group_size=3)), 3)
    assert torch.equal(fewer.final, together[0].final[:3])


def test_samples_start_at_independent_noises():
    (rollout,) = make().rollout(lambda x, s: x, SCHEDULE, (100, 100), [0], 0)
    noise = rollout.latents[0].flatten(1).double()
    assert (noise.var(1) - 1).abs().max() < 0.05
    assert torch.corrcoef(noise)[~torch.eye(GROUP, dtype=torch.bool)].abs().max() < 0.04


def test_a_rollout_keeps_what_its_trained_steps_need_and_one_evaluation_a_step():
    calls = []

    def counted(latents: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return velocity_fn(latents, sigma)

    (rollout,) = make().rollout(counted, SCHEDULE, SHAPE, [0], 0)
    assert calls == SCHEDULE.sigmas[:-1].tolist()
    assert rollout.latents.shape == (STEPS, GROUP, *SHAPE)
    assert rollout.velocities.shape == (STEPS - 1, GROUP, *SHAPE)
    for index in range(STEPS - 1):
        expected = velocity_fn(rollout.latents[index], SCHEDULE.sigmas[index].item())
        assert torch.equal(rollout.velocities[index], expected)


@pytest.mark.parametrize("step", ["sde", "cps"])
def test_without_fresh_noise_it_is_the_ode(step: str):
    algorithm = Algorithm(Config.model_construct(step=step, eta=0.0), ROLLOUT)
    rollout = roll_out(algorithm)
    trajectory = euler(velocity_fn, rollout.latents[0], SCHEDULE.sigmas)
    torch.testing.assert_close(rollout.latents, torch.stack(trajectory[:-1]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rollout.final, trajectory[-1], rtol=1e-6, atol=1e-6)


def test_the_last_step_is_stochastic_as_published_or_eulers():
    noisy, plain = (roll_out(make(noise_last_step=noise)) for noise in (True, False))
    assert torch.equal(noisy.latents, plain.latents)
    start, sigma = plain.latents[-1], SCHEDULE.sigmas[-2].item()
    torch.testing.assert_close(plain.final, start - sigma * velocity_fn(start, sigma), rtol=1e-6, atol=1e-6)
    removed = 0.7**2 * sigma / (1 - sigma) / 2  # of the predicted noise, x + (1 - sigma) v
    mean = plain.final - removed * (start + (1 - sigma) * velocity_fn(start, sigma))
    spread = (noisy.final - mean).std().item()
    assert spread == pytest.approx(0.7 * sigma / math.sqrt(1 - sigma), rel=0.1)


def test_marginals_of_an_analytic_gaussian_flow_are_kept():
    """Clean data N(2, 0.5^2): the exact velocity is affine; 40 steps from 0.95 on keep mean and variance to 2%."""
    mean, deviation = 2.0, 0.5

    def exact(latents: Tensor, sigma: float) -> Tensor:
        variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
        centered = latents - (1 - sigma) * mean
        return (sigma - (1 - sigma) * deviation**2) / variance * centered - mean

    sigmas = torch.cat([0.95 * flow_sigmas(100)[:-1], torch.zeros(1)])
    algorithm = make(RolloutConfig(num_steps=100, group_size=8), noise_last_step=False)
    sigma = sigmas[0].item()
    start = (1 - sigma) * mean + math.sqrt((1 - sigma) ** 2 * deviation**2 + sigma**2) * torch.randn(1, 8, 50, 50)
    algorithm.noises = lambda shape, seeds, *labels: start if labels == ("start",) else torch.randn(1, 8, 50, 50)
    (rollout,) = algorithm.rollout(exact, Schedule(sigmas, 1.0), (50, 50), [0], 0)
    assert rollout.final.mean().item() == pytest.approx(mean, abs=0.02)
    assert rollout.final.std().item() == pytest.approx(deviation, rel=0.02)


# Advantages and updates ---------------------------------------------------------------------------------------------


def test_advantages_have_the_groups_mean_and_the_deviation_of_all_rewards():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [10.0, 10.0, 13.0], [4.0, 4.0, 4.0]])
    found = make().advantages(RewardBatch(rewards, torch.ones(3, 3, dtype=torch.bool), {}))
    deviation = rewards.double().std(correction=0)
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, -1.0, 2.0], [0.0, 0.0, 0.0]]).double() / (deviation + 1e-4)
    torch.testing.assert_close(found, expected)
    assert not found[2].any()
    clamped = make(max_advantage=0.3).advantages(RewardBatch(rewards, torch.ones(3, 3, dtype=torch.bool), {}))
    torch.testing.assert_close(clamped, expected.clamp(-0.3, 0.3))


def test_a_failed_reward_counts_nowhere():
    rewards = torch.tensor([[0.0, 2.0, 99.0], [1.0, 1.0, 1.0]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    found = make().advantages(RewardBatch(rewards, valid, {}))
    deviation = math.sqrt(2 / 5)
    torch.testing.assert_close(found[0], torch.tensor([-1.0, 1.0, 0.0]).double() / (deviation + 1e-4))


def test_every_sample_trains_all_steps_but_the_last_in_one_of_the_updates():
    updates = make().updates(torch.ones(4, GROUP), seed=0, iteration=0)
    assert [len(update) for update in updates] == [12 * (STEPS - 1)] * 2
    counts = Counter(transition for update in updates for transition in update)
    assert set(counts.values()) == {1}
    assert {t.step for t in counts} == set(range(STEPS - 1))
    owners = [{(t.group, t.sample) for t in update} for update in updates]
    assert not owners[0] & owners[1]


def test_fewer_steps_are_drawn_for_each_sample():
    (update,) = make(num_train_steps=2, updates_per_rollout=1).updates(torch.ones(50, GROUP), seed=0, iteration=0)
    assert set(Counter((t.group, t.sample) for t in update).values()) == {2}
    steps = Counter(t.step for t in update)
    assert steps.keys() == set(range(STEPS - 1))
    assert max(steps.values()) / min(steps.values()) < 1.4


def test_a_group_without_advantages_gives_no_transition():
    advantages = torch.ones(2, GROUP)
    advantages[0] = 0
    updates = make().updates(advantages, seed=0, iteration=0)
    assert {t.group for update in updates for t in update} == {1}
    assert make().updates(torch.zeros(2, GROUP), seed=0, iteration=0) == [[], []]


# Loss ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["sde", "cps"])
@pytest.mark.parametrize("index", range(STEPS - 1))
def test_unchanged_weights_have_a_ratio_of_exactly_1_and_the_policy_gradient(step: str, index: int):
    algorithm = make(step=step)
    rollout, advantages = roll_out(algorithm), torch.linspace(-1, 1, GROUP).double()
    current = rollout.velocities[index, 1].clone().requires_grad_()
    for old in (current.detach(), None):
        loss, metrics = algorithm.loss(rollout, advantages, Transition(0, 1, index), Velocities(current, old))
        assert loss.item() == -advantages[1].item()
        assert metrics == {"policy/clip_fraction": 0.0, "policy/max_abs_log_ratio": 0.0}
    (gradient,) = torch.autograd.grad(loss, current)
    sigma, sigma_next = SCHEDULE.sigmas[index].double(), SCHEDULE.sigmas[index + 1].double()
    weights = current.detach().double().requires_grad_()
    start, end = rollout.latents[index, 1].double(), rollout.latents[index + 1, 1].double()
    if step == "cps":
        std = sigma_next * math.sin(0.35 * math.pi)
        mean = (1 - sigma_next) * (start - sigma * weights) + (sigma_next**2 - std**2).sqrt() * (
            start + (1 - sigma) * weights
        )
        log_prob = -(end - mean).square().mean()
    else:
        diffusion = 0.7 * (sigma / (1 - (sigma if sigma < 1 else SCHEDULE.sigmas[1].double()))).sqrt()
        dt = sigma_next - sigma
        mean = start * (1 + diffusion**2 / (2 * sigma) * dt)
        mean = mean + weights * (1 + diffusion**2 * (1 - sigma) / (2 * sigma)) * dt
        log_prob = Normal(mean, diffusion * (-dt).sqrt()).log_prob(end).mean()
    (expected,) = torch.autograd.grad(-advantages[1] * log_prob, weights)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-9)


def test_a_later_update_compares_with_the_velocities_of_the_rollout():
    algorithm, index = make(clip_range=0.5), 2
    rollout, advantages = roll_out(algorithm), torch.ones(GROUP).double()
    moved = rollout.velocities[index, 0] * 1.05
    loss, metrics = algorithm.loss(rollout, advantages, Transition(0, 0, index), Velocities(moved, None))
    sigma, sigma_next = (SCHEDULE.sigmas[index + i].double() for i in (0, 1))
    diffusion, dt = 0.7 * (sigma / (1 - sigma)).sqrt(), sigma_next - sigma

    def log_prob(velocity: Tensor) -> Tensor:
        start = rollout.latents[index, 0].double()
        mean = start * (1 + diffusion**2 / (2 * sigma) * dt)
        mean = mean + velocity.double() * (1 + diffusion**2 * (1 - sigma) / (2 * sigma)) * dt
        return Normal(mean, diffusion * (-dt).sqrt()).log_prob(rollout.latents[index + 1, 0].double()).mean()

    expected = log_prob(moved) - log_prob(rollout.velocities[index, 0])
    assert abs(expected.item()) > 1e-4
    assert metrics["policy/max_abs_log_ratio"] == pytest.approx(abs(expected.item()), rel=1e-4)
    assert loss.item() == pytest.approx(-math.exp(expected.item()), rel=1e-6)


def test_the_reference_pulls_by_the_published_divergence():
    rollout, advantages, index = roll_out(make()), torch.zeros(GROUP).double(), 1
    current, base = rollout.velocities[index, 0], rollout.velocities[index, 0] + 0.1
    velocities = Velocities(current, current, base)
    loss, _ = make(reference_weight=0.04).loss(rollout, advantages, Transition(0, 0, index), velocities)
    sigma, dt = SCHEDULE.sigmas[index].item(), (SCHEDULE.sigmas[index + 1] - SCHEDULE.sigmas[index]).item()
    variance = 0.7**2 * sigma / (1 - sigma)
    drift = 0.1 * (1 + variance * (1 - sigma) / (2 * sigma)) * dt
    assert loss.item() == pytest.approx(0.04 * drift**2 / (2 * variance), rel=1e-5)


def test_the_guard_takes_the_bias_and_the_scale_out_of_the_ratio_and_the_length_out_of_the_loss():
    algorithm, index = make(guard=True, clip_range=0.5), 2
    rollout, advantages = roll_out(algorithm), torch.ones(GROUP).double()
    moved = rollout.velocities[index, 0] * 1.05
    loss, metrics = algorithm.loss(rollout, advantages, Transition(0, 0, index), Velocities(moved, None))
    sigma, dt = SCHEDULE.sigmas[index].double(), (SCHEDULE.sigmas[index + 1] - SCHEDULE.sigmas[index]).double()
    diffusion = 0.7 * (sigma / (1 - sigma)).sqrt()
    old, new = (
        rollout.latents[index, 0].double() * (1 + diffusion**2 / (2 * sigma) * dt)
        + velocity.double() * (1 + diffusion**2 * (1 - sigma) / (2 * sigma)) * dt
        for velocity in (rollout.velocities[index, 0], moved)
    )
    deviation = diffusion * (-dt).sqrt()
    end = rollout.latents[index + 1, 0].double()
    change = (Normal(new, deviation).log_prob(end) - Normal(old, deviation).log_prob(end)).mean()
    bias = (new - old).square().mean() / (2 * deviation**2)
    expected = (change + bias) * deviation
    assert abs(expected.item()) > 1e-4
    assert metrics["policy/max_abs_log_ratio"] == pytest.approx(abs(expected.item()), rel=1e-4)
    assert loss.item() == pytest.approx(math.exp(expected.item()) / dt.item(), rel=1e-6)


# A real run ---------------------------------------------------------------------------------------------------------

RUN = [
    "algorithm=flow_grpo",
    "algorithm.updates_per_rollout=2",
    "rollout.num_steps=4",
    "rollout.shift=3.0",
    "evaluation.solver=dpmpp_2m",
    "evaluation.num_steps=6",
    "trainer.micro_batch_size=4",
    "optimizer.learning_rate=1e-30",
]


def flow_config(make_config: MakeConfig, folder: Path, *overrides: str) -> Any:
    data = make_config(folder).model_dump(mode="json")
    data["algorithm"] = {"name": "flow_grpo"}
    from ngrpo_lora.config import parse_config

    settings = dict(text.split("=", 1) for text in (*RUN[1:], *overrides))
    for key, value in settings.items():
        section, field = key.split(".")
        data[section][field] = json.loads(value) if value[0] in "-.0123456789tfn[" else value
    return parse_config(data)


def test_a_run_costs_what_the_method_costs_and_starts_at_a_ratio_of_1(make_config: MakeConfig, tmp_path: Path):
    """NFE_old is the steps: the second update has its old velocities from the rollout. NFE_theta: all but the last."""
    from ngrpo_lora.training.setup import prepare
    from ngrpo_lora.training.trainer import complete

    complete(prepare(flow_config(make_config, tmp_path, "trainer.num_iterations=1")))
    row = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()][-1]
    assert row["nfe/old_per_sample"] == 4
    assert row["nfe/theta_per_sample"] == 3
    assert row["policy/max_abs_log_ratio"] < 1e-5  # the later update's: batches of another size round differently
    assert row["policy/clip_fraction"] == 0
    assert row["lora/grad_norm"] > 0
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["algorithm.step=cps", "algorithm.eta=1.2"],
            "algorithm.eta must be at most 1 with algorithm.step=cps, got 1.2",
        ),
        (["rollout.num_steps=4", "algorithm.num_train_steps=4"], "must be less than rollout.num_steps .4."),
        (["algorithm.updates_per_rollout=97"], "at most the samples of an iteration .96., got 97"),
        (["algorithm.num_anchors=4"], "unknown key algorithm.num_anchors"),
        (["algorithm.step=cps", "algorithm.guard=true"], "algorithm.guard needs algorithm.step=sde"),
        (["algorithm.eta=0"], "algorithm.eta must be more than 0, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config("demo", ["algorithm=flow_grpo", *settings])
