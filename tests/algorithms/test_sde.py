"""What every SDE baseline claims: the ODE without noise, the flow's marginals, and its own log-probability."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from flows import (
    DEVIATION,
    MEAN,
    SHAPE,
    algorithm_of,
    gaussian_start,
    gaussian_velocity,
    last_metrics,
    run_config,
    schedule_of,
    velocity_fn,
)
from torch import Tensor
from torch.distributions import Normal

from ngrpo_lora.algorithms._sde import SdeRollout
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import euler, flow_sigmas
from ngrpo_lora.types import RewardBatch, Transition, Velocities

STEPS, GROUP = 8, 4
ROLLOUT = RolloutConfig(num_steps=STEPS, group_size=GROUP)
METHODS: dict[str, dict[str, Any]] = {
    "dance": {"updates_per_rollout": 1},
    "mix": {"updates_per_rollout": 1, "window_size": 3},
    "mix_flash": {"updates_per_rollout": 1, "window_size": 3},
    "branch": {"updates_per_rollout": 1, "split_noise": 1.0},
}
ITERATION = 60  # the windows of MixGRPO have moved


def roll_out(algorithm: Any, seed: int = 0, iteration: int = ITERATION) -> SdeRollout:
    (rollout,) = algorithm.rollout(velocity_fn, schedule_of(STEPS), SHAPE, [seed], iteration)
    assert isinstance(rollout, SdeRollout)
    return rollout


@pytest.mark.parametrize("method", METHODS)
def test_a_rollout_is_a_function_of_its_seed_and_of_nothing_beside_it(method: str):
    algorithm = algorithm_of(method, ROLLOUT, **METHODS[method])
    together = algorithm.rollout(velocity_fn, schedule_of(STEPS), SHAPE, [3, 4], ITERATION)
    for seed, beside in zip((3, 4), together, strict=True):
        alone = roll_out(algorithm, seed)
        assert all(torch.equal(tensor, vars(beside)[name]) for name, tensor in vars(alone).items())
    assert not torch.equal(together[0].final, together[1].final)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_starts_at_one_noise_and_parts_on_the_way(method: str):
    rollout = roll_out(algorithm_of(method, ROLLOUT, **METHODS[method]))
    assert torch.equal(rollout.latents[0], rollout.latents[0, :1].expand(GROUP, *SHAPE))
    finals = rollout.final.flatten(1)
    assert torch.cdist(finals, finals)[~torch.eye(GROUP, dtype=torch.bool)].min() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_a_rollout_keeps_the_velocities_of_its_trained_steps(method: str):
    rollout = roll_out(algorithm_of(method, ROLLOUT, **METHODS[method]))
    count = len(rollout.velocities)
    assert rollout.latents.shape == (count + 1, GROUP, *SHAPE)
    assert rollout.sigmas.shape == (count + 1,)
    for index in range(count):
        expected = velocity_fn(rollout.latents[index], rollout.sigmas[index].item())
        torch.testing.assert_close(rollout.velocities[index], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["dance", "mix", "branch"])
def test_without_fresh_noise_it_is_the_ode(method: str):
    rollout = roll_out(algorithm_of(method, ROLLOUT, **METHODS[method], eta=0.0), iteration=0)
    trajectory = euler(velocity_fn, rollout.latents[0], flow_sigmas(STEPS, 3.0))
    torch.testing.assert_close(rollout.final, trajectory[-1], rtol=1e-5, atol=1e-5)
    for latents, expected in zip(rollout.latents, trajectory, strict=False):
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_marginals_of_an_analytic_gaussian_flow_are_kept(method: str, monkeypatch: pytest.MonkeyPatch):
    """From sigma 0.95 on, in 100 steps; a window of MixGRPO holds 50 of them. Leaves of a tree share some noise."""
    settings = METHODS[method] | ({"window_size": 50, "window": "frozen"} if "mix" in method else {})
    settings |= {"rest_ratio": 1.0} if method == "mix_flash" else {}
    rollout_config = RolloutConfig(num_steps=100, group_size=8)
    algorithm = algorithm_of(method, rollout_config, **settings)
    sigmas = torch.cat([0.95 * flow_sigmas(100)[:-1], torch.zeros(1)])
    shape = (200, 200) if method == "branch" else (60, 60)
    starts = gaussian_start(sigmas[0].item(), (1, 8, *shape))
    monkeypatch.setattr(algorithm, "starts", lambda latent_shape, seeds: starts)
    monkeypatch.setattr(algorithm, "noises", lambda latent_shape, seeds, *labels: torch.randn(1, 8, *shape))
    (rollout,) = algorithm.rollout(gaussian_velocity, Schedule(sigmas, 1.0), shape, [0], 0)
    assert rollout.final.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert rollout.final.std().item() == pytest.approx(DEVIATION, rel=0.02)


def log_prob(method: str, start: Tensor, velocity: Tensor, end: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """By the published formulas, in float64."""
    start, velocity, end = start.double(), velocity.double(), end.double()
    dt = sigma_next - sigma
    if "mix" in method:
        diffusion = 0.7 * (sigma / (1 - sigma)).sqrt()
        mean = start * (1 + diffusion**2 / (2 * sigma) * dt)
        mean = mean + velocity * (1 + diffusion**2 * (1 - sigma) / (2 * sigma)) * dt
    else:
        diffusion, clean = torch.tensor(0.3, dtype=torch.float64), start - sigma * velocity
        mean = start + velocity * dt + 0.5 * diffusion**2 * (start - clean * (1 - sigma)) / sigma**2 * dt
    return Normal(mean, diffusion * (-dt).sqrt()).log_prob(end).mean()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("index", [0, 2])
def test_the_loss_is_that_of_the_published_log_probability(method: str, index: int):
    """At the old weights the ratio is exactly 1, with the gradient of log pi; elsewhere it is the published one."""
    algorithm = algorithm_of(method, ROLLOUT, **METHODS[method], clip_range=0.5)
    rollout, rewards = roll_out(algorithm), torch.tensor([[0.1, 0.9, 0.3, 0.5]])
    (advantages,) = algorithm.advantages(RewardBatch(rewards, torch.ones(1, GROUP, dtype=torch.bool), {}))
    transition, old = Transition(0, 2, index), rollout.velocities[index, 2]
    advantage = advantages.view(-1, GROUP)[index if method == "branch" else 0, 2].item()
    assert advantage != 0
    current = old.clone().requires_grad_()
    for given in (old, None):
        loss, metrics = algorithm.loss(rollout, advantages, transition, Velocities(current, given))
        assert loss.item() == -advantage
        assert metrics == {"policy/clip_fraction": 0.0, "policy/max_abs_log_ratio": 0.0}
    (gradient,) = torch.autograd.grad(loss, current)
    ends = rollout.latents[index, 2], rollout.latents[index + 1, 2]
    sigma, sigma_next = rollout.sigmas[index].double(), rollout.sigmas[index + 1].double()
    weights = old.double().requires_grad_()
    value = log_prob(method, ends[0], weights, ends[1], sigma, sigma_next)
    (expected,) = torch.autograd.grad(-advantage * value, weights)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-7)

    moved = old * 1.3
    loss, _ = algorithm.loss(rollout, advantages, transition, Velocities(moved, None))
    change = log_prob(method, ends[0], moved, ends[1], sigma, sigma_next) - value
    assert abs(change.item()) > 1e-5
    assert loss.item() == pytest.approx(-advantage * math.exp(change.item()), rel=1e-5)


def test_the_reference_pulls_by_the_divergence_of_two_gaussians():
    from torch.distributions import kl_divergence

    algorithm = algorithm_of("dance", ROLLOUT, reference_weight=0.04)
    rollout, advantages, index = roll_out(algorithm), torch.zeros(GROUP).double(), 1
    current, base = rollout.velocities[index, 0], rollout.velocities[index, 0] + 0.1
    loss, _ = algorithm.loss(rollout, advantages, Transition(0, 0, index), Velocities(current, current, base))
    sigma, dt = rollout.sigmas[index].item(), (rollout.sigmas[index + 1] - rollout.sigmas[index]).item()
    drift = 0.1 * dt * (1 + 0.3**2 * (1 - sigma) / (2 * sigma))
    deviation = 0.3 * math.sqrt(-dt)
    expected = kl_divergence(Normal(drift, deviation), Normal(0.0, deviation)).item()
    assert loss.item() == pytest.approx(0.04 * expected, rel=1e-5)


def test_advantages_are_standardised_within_their_group_by_the_unbiased_deviation():
    algorithm = algorithm_of("dance", RolloutConfig(num_steps=STEPS, group_size=3), max_advantage=1.1)
    rewards = torch.tensor([[0.0, 1.0, 2.0], [10.0, 10.0, 13.0], [4.0, 4.0, 4.0], [0.0, 2.0, 99.0]])
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[3, 2] = False
    found = algorithm.advantages(RewardBatch(rewards, valid, {}))
    expected = [[-1.0, 0.0, 1.0], [-1 / math.sqrt(3), -1 / math.sqrt(3), 1.1], [0.0] * 3, [-(0.5**0.5), 0.5**0.5, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


EVALUATIONS = {  # NFE_old and NFE_theta per sample by the method's own account
    "dance": (["rollout.num_steps=5"], 5, 2),
    "mix": (["rollout.num_steps=5", "algorithm.window_size=2"], 5, 2),
    "mix_flash": (["rollout.num_steps=6", "algorithm.window_size=2", "algorithm.rest_ratio=0.5"], 2 + 2, 2),
    # 1 root, 2 and 2 nodes, 4 leaves twice; edges 2, 2, 4, 4, 4
    "branch": (["rollout.num_steps=5", "algorithm.split_every=2"], (1 + 2 + 2 + 4 + 4) / 4, (2 + 2 + 4 + 4 + 4) / 4),
}


@pytest.mark.parametrize("method", EVALUATIONS)
def test_a_run_costs_what_the_method_costs_and_starts_at_a_ratio_of_1(
    method: str, make_config: MakeConfig, tmp_path: Path
):
    from ngrpo_lora.training.setup import prepare
    from ngrpo_lora.training.trainer import complete

    settings, old, theta = EVALUATIONS[method]
    updates = ["algorithm.updates_per_rollout=2", "trainer.num_iterations=1", "evaluation.num_prompts=1"]
    complete(prepare(run_config(make_config, tmp_path, method, *settings, *updates)))
    row = last_metrics(tmp_path)
    assert row["nfe/old_per_sample"] == old
    assert row["nfe/theta_per_sample"] == theta
    assert row["policy/max_abs_log_ratio"] < 1e-5  # the later update's: batches of another size round differently
    assert row["policy/clip_fraction"] == 0
    assert row["lora/grad_norm"] > 0
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()
