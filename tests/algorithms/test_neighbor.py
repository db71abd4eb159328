"""Neighbor GRPO's four decisions, on flows made of a formula."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from safetensors.torch import load_file
from torch import Tensor

from ngrpo_lora import auto_temperature, flow_sigmas, gaussian_noise, group_advantages, leaping_log_ratio
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.algorithms import neighbor
from ngrpo_lora.algorithms._base import losses
from ngrpo_lora.algorithms.neighbor import Algorithm, Config, NeighborRollout
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import SOLVERS
from ngrpo_lora.types import RewardBatch, Rollout, Transition, Velocities

SHAPE = (4, 6, 6)
ROLLOUT = RolloutConfig(num_steps=5, group_size=6)
ADVANTAGES = torch.ones(300, 6)


def make(rollout: RolloutConfig = ROLLOUT, **settings: Any) -> Algorithm:
    return Algorithm(Config(**settings), rollout)


def schedule(num_steps: int) -> Schedule:
    return Schedule(flow_sigmas(num_steps), 1.0)


def velocity_fn(latents: Tensor, sigma: float) -> Tensor:
    return torch.sin(2 * latents) + sigma * latents


def roll_out(algorithm: Algorithm, seed: int = 0) -> NeighborRollout:
    rollout = algorithm.rollout(velocity_fn, schedule(algorithm.num_steps), SHAPE, [seed], 0)[0]
    assert isinstance(rollout, NeighborRollout)
    return rollout


def old_velocity(rollout: Rollout, transition: Transition) -> Tensor:
    step = transition.step
    return velocity_fn(rollout.latents[step, transition.sample], rollout.sigmas[step].item())


def advantages_of(rollout: Rollout) -> Tensor:
    return group_advantages(rollout.latents[-1].mean((1, 2, 3))[None])[0]


# Rollout ------------------------------------------------------------------------------------------------------------


def test_a_rollout_is_a_function_of_its_seed():
    first, again, other = (roll_out(make(), seed).latents for seed in (1, 1, 2))
    assert first.shape == (6, 6, *SHAPE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_candidate_does_not_depend_on_how_many_there_are():
    small, large = (roll_out(make(RolloutConfig(num_steps=5, group_size=g))).latents for g in (3, 8))
    assert torch.equal(small, large[:, :3])


@pytest.mark.parametrize("distance", ["latent", "clean"])
def test_a_group_does_not_depend_on_the_groups_beside_it(distance: str):
    algorithm = make(distance=distance)
    together = algorithm.rollout(velocity_fn, schedule(5), SHAPE, [3, 4, 5], 0)
    for seed, beside in zip((3, 4, 5), together, strict=True):
        (alone,) = algorithm.rollout(velocity_fn, schedule(5), SHAPE, [seed], 0)
        assert {name: t.shape for name, t in vars(alone).items()} == {n: t.shape for n, t in vars(beside).items()}
        assert all(torch.equal(t, vars(beside)[name]) for name, t in vars(alone).items())


@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_candidates_start_as_neighbors(strength: float):
    (rollout,) = make(perturbation_strength=strength).rollout(lambda x, s: x, schedule(5), (200, 100), [0], 0)
    noise = rollout.latents[0].flatten(1).double()
    assert (noise.var(1) - 1).abs().max() < 0.05
    correlation = torch.corrcoef(noise)[~torch.eye(6, dtype=torch.bool)]
    torch.testing.assert_close(correlation, torch.full((30,), 1 - strength**2).double(), rtol=0, atol=0.04)


def test_antithetic_pairs_are_on_opposite_sides_of_the_base_noise():
    plain, paired = (make(antithetic_pairs=pairs).neighborhood(SHAPE, 3).double() for pairs in (False, True))
    base = paired[0] + paired[1]  # twice sqrt(1 - r^2) of it
    for first, second in paired.unflatten(0, (3, 2)):
        torch.testing.assert_close(first + second, base)
    for pair, single in zip(paired[::2], plain[:3], strict=True):
        torch.testing.assert_close(pair, single)
    deviation = make(RolloutConfig(num_steps=5, group_size=6), antithetic_pairs=True).neighborhood((200, 100), 0)
    assert (deviation.flatten(1).var(1) - 1).abs().max() < 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_candidates_follow_the_configured_solver(solver: str):
    """Euler's step, or DPM-Solver++ 2M as its paper writes it, in log-SNR and float64."""
    rollout = roll_out(make(RolloutConfig(num_steps=5, group_size=6, solver=solver)))
    latents, sigmas, history = rollout.latents[0].double(), rollout.sigmas.tolist(), None
    for step, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        velocity = velocity_fn(latents, sigma)
        clean = latents - sigma * velocity
        if solver == "euler" or history is None or sigma_next == 0:
            latents = latents + (sigma_next - sigma) * velocity
        else:
            now, following, before = (
                math.log((1 - s) / s) if s < 1 else -math.inf for s in (sigma, sigma_next, history[0])
            )
            length = following - now
            extrapolated = clean + length / (now - before) / 2 * (clean - history[1])
            latents = sigma_next / sigma * latents - (1 - sigma_next) * math.expm1(-length) * extrapolated
        history = (sigma, clean)
        torch.testing.assert_close(rollout.latents[step + 1].double(), latents, rtol=1e-4, atol=1e-4)
    other = {"euler": "dpmpp_2m", "dpmpp_2m": "euler"}[solver]
    elsewhere = roll_out(make(RolloutConfig(num_steps=5, group_size=6, solver=other)))
    assert (elsewhere.final - rollout.final).abs().max() > 1e-2


# Advantages ---------------------------------------------------------------------------------------------------------


REWARDS = torch.tensor([[0.0, 1.0, 2.0, 9.0], [5.0, 5.1, 5.2, 5.3], [1.0, 1.0, 4.0, 4.0]])
VALID = torch.tensor([[True, True, True, False], [True] * 4, [True] * 4])


def test_advantages_are_the_quasi_norm_of_valid_rewards():
    """Of -1, 0, 1 (the fourth failed), of -0.15, -0.05, 0.05, 0.15, and of two times -1.5 and 1.5."""
    found = make(advantage_p=0.7).advantages(RewardBatch(REWARDS, VALID, {}))
    first, third = math.sqrt(3) / 2 ** (1 / 0.7), 2 / 4 ** (1 / 0.7)
    second = 2 * 0.05 / (2 * 0.15**0.7 + 2 * 0.05**0.7) ** (1 / 0.7)
    expected = [[-first, 0, first, 0], [-3 * second, -second, second, 3 * second], [-third, -third, third, third]]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


def test_advantages_of_a_batch_are_divided_by_its_deviation():
    """Squares about the means: 1 + 0 + 1, 2 (0.15^2 + 0.05^2), 4 * 1.5^2; 11 rewards."""
    deviation = math.sqrt((2 + 0.05 + 9) / 11)
    found = make(scale_rewards="batch").advantages(RewardBatch(REWARDS, VALID, {}))
    centered = torch.tensor([[-1.0, 0, 1, 0], [-0.15, -0.05, 0.05, 0.15], [-1.5, -1.5, 1.5, 1.5]]).double()
    torch.testing.assert_close(found, centered / deviation, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_advantages_and_what_is_skipped_do_not_depend_on_the_rewards_scale(scale_rewards: str, factor: float):
    """The deviation is 1.002: the second group's rewards lie within 0.3 of it, not within 0.29."""
    for share, skipped in ((0.31, True), (0.29, False)):
        algorithm = make(scale_rewards=scale_rewards, min_reward_spread=share)
        found = algorithm.advantages(RewardBatch(factor * REWARDS.double(), VALID, {}))
        torch.testing.assert_close(found, algorithm.advantages(RewardBatch(REWARDS.double(), VALID, {})))
        assert found[1].any() != skipped
        assert found[0].any()
        assert found[2].any()


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_groups_that_are_all_flat_have_no_advantages(scale_rewards: str):
    flat = RewardBatch(torch.full((3, 7), 97.1), torch.ones(3, 7, dtype=torch.bool), {})
    assert not make(scale_rewards=scale_rewards, min_reward_spread=0.5).advantages(flat).any()


# Updates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_updates", [1, 2, 3, 6])
@pytest.mark.parametrize(("num_anchors", "num_train_steps"), [(3, 2), (6, 5), (2, 3)])
def test_every_group_gives_b_anchors_with_k_steps_each(num_anchors: int, num_train_steps: int, num_updates: int):
    settings = {"num_anchors": num_anchors, "num_train_steps": num_train_steps, "updates_per_rollout": num_updates}
    updates = make(**settings).updates(ADVANTAGES[:4], seed=0, iteration=0)
    assert len(updates) == num_updates
    transitions = [transition for update in updates for transition in update]
    assert len(set(transitions)) == len(transitions) == 4 * num_anchors * num_train_steps
    assert {t.sample for t in transitions} <= set(range(6))
    assert {t.step for t in transitions} <= set(range(5))
    for group in range(4):
        steps = Counter(t.sample for t in transitions if t.group == group)
        assert list(steps.values()) == [num_train_steps] * num_anchors
        shares = [sum(t.group == group for t in update) for update in updates]
        assert max(shares) - min(shares) <= 1


def test_updates_are_a_function_of_their_seed():
    algorithm = make(updates_per_rollout=2)
    first, again, other = (algorithm.updates(ADVANTAGES[:3], seed, iteration=0) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_a_group_without_advantages_gives_no_transition():
    algorithm, advantages = make(updates_per_rollout=2), torch.eye(6)[:4]
    advantages[2] = 0
    first, second = algorithm.updates(advantages, seed=0, iteration=0)
    assert {t.group for t in first + second} == {0, 1, 3}
    assert algorithm.updates(torch.zeros(3, 6), seed=0, iteration=0) == [[], []]


def test_every_anchor_and_every_step_is_as_likely_as_any_other():
    """Symmetric anchor sampling: 300 groups of B = 2 of 6, K = 2 of 5."""
    (update,) = make(num_anchors=2, num_train_steps=2).updates(ADVANTAGES[:300], seed=0, iteration=0)
    anchors, steps = Counter(t.sample for t in update), Counter(t.step for t in update)
    for count, share in ((anchors, 1 / 6), (steps, 1 / 5)):
        for k in range(round(1 / share)):
            assert count[k] / len(update) == pytest.approx(share, abs=0.04)


def test_a_window_trains_the_first_steps_only():
    updates = make(num_train_steps=2, train_window=3).updates(ADVANTAGES[:50], seed=0, iteration=0)
    assert {t.step for update in updates for t in update} == {0, 1, 2}


# Loss ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", ["auto", 1.0])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("step", [0, 2, 4])
def test_unchanged_weights_give_log_ratio_0_no_clip_and_the_closed_form_gradient(
    step: int, solver: str, temperature: float | str
):
    algorithm = make(RolloutConfig(num_steps=5, group_size=6, solver=solver), temperature=temperature)
    rollout, transition = roll_out(algorithm), Transition(0, 3, step)
    advantages = advantages_of(rollout)
    current = old_velocity(rollout, transition).requires_grad_()
    loss, metrics = algorithm.loss(rollout, advantages, transition, Velocities(current, current.detach()))
    assert metrics["policy/max_abs_log_ratio"] == 0
    assert metrics["policy/clip_fraction"] == 0
    assert loss.item() == pytest.approx(0, abs=1e-12)

    loss.backward()
    candidates, dt = rollout.latents[step + 1], rollout.sigmas[step + 1] - rollout.sigmas[step]
    tau = auto_temperature(candidates) if temperature == "auto" else temperature
    offsets = candidates - (rollout.latents[step, 3] + dt * current.detach())
    expected = -(2 / tau) * dt * torch.einsum("g,gchw->chw", advantages, offsets.double())
    assert expected.abs().max() > 1e-4
    assert current.grad is not None
    torch.testing.assert_close(current.grad, expected.float(), rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_literal_reading_agrees_with_one_step_where_the_rollout_is_one_step(solver: str):
    """Euler's next latent is the one-step transition; DPM-Solver++'s is not, which moves ratios before any learning."""
    rollout_config, temperature = RolloutConfig(num_steps=5, group_size=6, solver=solver), 1.0
    found = {}
    for old_anchor in ("one_step", "rollout"):
        algorithm = make(rollout_config, old_anchor=old_anchor, temperature=temperature)
        rollout, transition = roll_out(algorithm), Transition(0, 1, 3)
        velocity = old_velocity(rollout, transition)
        _, metrics = algorithm.loss(rollout, advantages_of(rollout), transition, Velocities(velocity, velocity))
        found[old_anchor] = metrics
    assert found["one_step"]["policy/max_abs_log_ratio"] == 0
    if solver == "euler":
        assert found["rollout"]["policy/max_abs_log_ratio"] < 1e-4
        assert found["rollout"]["policy/clip_fraction"] == 0
        entropies = [found[old_anchor]["policy/entropy"].item() for old_anchor in found]
        assert entropies[1] == pytest.approx(entropies[0], abs=1e-4)
    else:
        assert found["rollout"]["policy/max_abs_log_ratio"] > 0.01
        assert found["rollout"]["policy/clip_fraction"] > 0


def test_the_literal_reading_compares_the_new_one_step_anchor_with_the_rollouts_own_point():
    algorithm = make(old_anchor="rollout", temperature=2.0)
    rollout, (_, anchor, step) = roll_out(algorithm), (transition := Transition(0, 2, 3))
    current = old_velocity(rollout, transition) + 0.1
    _, metrics = algorithm.loss(rollout, advantages_of(rollout), transition, Velocities(current, current - 0.1))
    candidates, dt = rollout.latents[step + 1], rollout.sigmas[step + 1] - rollout.sigmas[step]
    new, old = rollout.latents[step, anchor] + dt * current, candidates[anchor]
    log_ratio = leaping_log_ratio(candidates.double(), old.double(), (new - old).double(), 2.0)
    assert metrics["policy/max_abs_log_ratio"] == pytest.approx(log_ratio.abs().max().item(), rel=1e-4)


def test_changed_weights_give_the_log_ratio_of_their_displacement_and_clip_beyond_the_range():
    algorithm = make(clip_range=0.01, temperature=3.0)
    rollout, transition = roll_out(algorithm), Transition(0, 0, 2)
    advantages, old = advantages_of(rollout), old_velocity(rollout, transition)
    current = old + gaussian_noise(SHAPE, seed=1)
    loss, metrics = algorithm.loss(rollout, advantages, transition, Velocities(current, old))

    dt = rollout.sigmas[3] - rollout.sigmas[2]
    log_ratio = leaping_log_ratio(rollout.latents[3], rollout.latents[2, 0] + dt * old, dt * (current - old), 3.0)
    ratio = log_ratio.exp()
    terms = torch.minimum(advantages * ratio, advantages * ratio.clamp(0.99, 1.01))
    assert loss.item() == pytest.approx(-terms.sum().item(), rel=1e-5)
    assert metrics["policy/max_abs_log_ratio"] == pytest.approx(log_ratio.abs().max().item(), rel=1e-5)
    clipped = (terms < advantages * ratio).double().mean().item()
    assert 0 < metrics["policy/clip_fraction"] == pytest.approx(clipped)


def test_the_reference_term_is_the_squared_displacement_from_the_base_model():
    weight, tau = 0.25, 5.0
    algorithm = make(reference_weight=weight, temperature=tau)
    assert algorithm.needs_reference
    assert not make().needs_reference
    rollout, transition = roll_out(algorithm), Transition(0, 4, 1)
    old, reference = old_velocity(rollout, transition), torch.randn(SHAPE)
    current = old.clone().requires_grad_()
    loss, _ = algorithm.loss(
        rollout, torch.zeros(6, dtype=torch.float64), transition, Velocities(current, old, reference)
    )
    dt = rollout.sigmas[2] - rollout.sigmas[1]
    assert loss.item() == pytest.approx(
        weight * dt.item() ** 2 * (old - reference).square().sum().item() / tau, rel=1e-5
    )
    loss.backward()
    assert current.grad is not None
    torch.testing.assert_close(current.grad, 2 * weight * dt**2 * (old - reference) / tau)


def test_a_reference_term_of_velocities_is_the_same_at_every_step():
    algorithm = make(reference_weight=0.25, reference_distance="velocity")
    rollout, reference = roll_out(algorithm), torch.randn(SHAPE)
    for step in range(rollout.sigmas.numel() - 1):
        transition = Transition(0, 4, step)
        old = old_velocity(rollout, transition)
        current = (reference + 0.2).requires_grad_()
        loss, _ = algorithm.loss(
            rollout, torch.zeros(6, dtype=torch.float64), transition, Velocities(current, old, reference)
        )
        assert loss.item() == pytest.approx(0.25 * 0.2**2, rel=1e-4)
        loss.backward()
        assert current.grad is not None
        torch.testing.assert_close(current.grad, torch.full(SHAPE, 2 * 0.25 * 0.2 / current.numel()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("distance", ["latent", "clean"])
def test_every_step_has_the_temperature_of_its_own_candidates(distance: str):
    rollout = roll_out(make(distance=distance))
    for step, found in enumerate(rollout.temperatures.tolist()):
        clean = rollout.latents[step] - rollout.sigmas[step] * rollout.velocities[step] if distance == "clean" else None
        candidates = rollout.latents[step + 1] if clean is None else clean
        assert found == pytest.approx(torch.pdist(candidates.flatten(1).double()).square().mean().item(), rel=1e-5)


def test_auto_temperature_is_that_of_the_steps_own_candidates():
    rollout, transition = roll_out(make()), Transition(0, 4, 1)
    old = old_velocity(rollout, transition)
    velocities = Velocities(old + 0.3, old)
    auto, number = (
        make(temperature=tau).loss(rollout, advantages_of(rollout), transition, velocities)
        for tau in ("auto", auto_temperature(rollout.latents[2]))
    )
    assert auto[0].item() == number[0].item()
    assert auto[1] == number[1]


def test_temperatures_are_the_same_however_many_steps_are_taken_at_once(monkeypatch: pytest.MonkeyPatch):
    together = roll_out(make())
    for values in (1, 2 * together.final.numel()):
        monkeypatch.setattr(neighbor, "MAX_VALUES", values)
        torch.testing.assert_close(roll_out(make()).temperatures, together.temperatures, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("temperature", "entropy"), [(1e-6, 0.0), (1e9, math.log(6))])
def test_the_temperature_spans_a_certain_and_a_uniform_policy(temperature: float, entropy: float):
    algorithm = make(temperature=temperature)
    rollout, transition = roll_out(algorithm), Transition(0, 4, 1)
    old = old_velocity(rollout, transition)
    _, metrics = algorithm.loss(rollout, advantages_of(rollout), transition, Velocities(old, old))
    assert metrics["policy/entropy"] == pytest.approx(entropy, abs=1e-4)


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_anchors": 7}, r"algorithm.num_anchors must be at most rollout.group_size \(6\), got 7"),
        ({"num_train_steps": 6}, r"algorithm.num_train_steps must be at most rollout.num_steps \(5\), got 6"),
        ({"train_window": 6}, r"algorithm.train_window must be from .* \(4\) to rollout.num_steps \(5\), got 6"),
        ({"train_window": 3}, r"algorithm.train_window must be from .* \(4\) to rollout.num_steps \(5\), got 3"),
        (
            {"updates_per_rollout": 17},
            r"updates_per_rollout must be at most num_anchors \* num_train_steps \(16\), got 17",
        ),
    ],
)
def test_settings_that_do_not_fit_the_rollout_are_an_error(settings: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Config(**settings).check(ROLLOUT)


def test_pairs_need_an_even_group():
    with pytest.raises(ValueError, match=r"group_size must be even with algorithm.antithetic_pairs, got 7; 8 is"):
        Config(antithetic_pairs=True).check(RolloutConfig(num_steps=5, group_size=7))


def test_settings_at_their_limits_fit():
    Config(num_anchors=6, num_train_steps=5, updates_per_rollout=30).check(ROLLOUT)


# Distances between clean predictions --------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_clean_distances_compare_predictions_at_the_anchors_own_noise_level(solver: str):
    rollout_config = RolloutConfig(num_steps=5, group_size=6, solver=solver)
    algorithm = make(rollout_config, distance="clean", temperature=3.0, clip_range=0.9)
    rollout = roll_out(algorithm)
    advantages = advantages_of(rollout)
    for transition in (Transition(0, 2, 0), Transition(0, 4, 3)):
        old = old_velocity(rollout, transition)
        new = old + 0.01 * torch.cos(torch.arange(old.numel()).view(SHAPE))
        loss, metrics = algorithm.loss(rollout, advantages, transition, Velocities(new, old))

        sigma = rollout.sigmas[transition.step].item()
        at = rollout.latents[transition.step].double()
        clean = at - sigma * velocity_fn(at.float(), sigma).double()
        before = torch.log_softmax(-(clean - clean[transition.sample]).square().flatten(1).sum(1) / 3, 0)
        moved = at[transition.sample] - sigma * new.double()
        after = torch.log_softmax(-(clean - moved).square().flatten(1).sum(1) / 3, 0)
        expected = -(advantages * (after - before).exp()).sum()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        assert metrics["policy/max_abs_log_ratio"] == pytest.approx((after - before).abs().max().item(), rel=1e-4)


def test_clean_distances_start_at_a_candidate_whatever_the_solver():
    for old_anchor in ("one_step", "rollout"):
        algorithm = make(distance="clean", old_anchor=old_anchor)
        rollout = roll_out(algorithm)
        transition = Transition(0, 1, 2)
        old = old_velocity(rollout, transition)
        _, metrics = algorithm.loss(rollout, advantages_of(rollout), transition, Velocities(old, old))
        assert metrics["policy/max_abs_log_ratio"] < 1e-5


def test_a_candidate_whose_latents_are_not_finite_takes_no_part():
    """It has no score, and so no advantage; the others are a group of their own, wherever it stands among them."""
    algorithm = make(clip_range=0.5)
    rollout, transition = roll_out(algorithm), Transition(0, 3, 2)
    old = old_velocity(rollout, transition)
    velocities = Velocities(old + 0.1, old)
    advantages = torch.tensor([0.0, 1.0, -1.0, 0.5, -0.5, 0.3]).double()
    rollout.latents[:, 0] = rollout.final[0] = torch.nan
    rollout = algorithm.with_temperatures(rollout)
    broken = algorithm.loss(rollout, advantages, transition, velocities)
    without = replace(rollout, latents=rollout.latents[:, 1:], final=rollout.final[1:])
    alone = algorithm.loss(without, advantages[1:], Transition(0, 2, 2), velocities)
    assert math.isfinite(broken[0].item())
    assert broken[0].item() == pytest.approx(alone[0].item(), rel=1e-12)
    assert {k: v.item() for k, v in broken[1].items()} == pytest.approx({k: v.item() for k, v in alone[1].items()})
    updates = algorithm.updates(torch.stack([advantages] * 50), seed=0, iteration=0)
    assert {t.sample for update in updates for t in update} == {1, 2, 3, 4, 5}


# A micro-batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [10**9, 1])
@pytest.mark.parametrize(
    "settings",
    [{}, {"distance": "clean"}, {"old_anchor": "rollout", "temperature": 2.0}, {"reference_weight": 0.5}]
    + [{"reference_weight": 0.5, "reference_distance": "velocity"}, {"reuse_velocities": True}],
)
def test_transitions_at_once_are_those_one_by_one(
    settings: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch
):
    """Of several groups and steps, one of them with a candidate that failed."""
    algorithm = make(clip_range=0.05, **settings)
    rollouts = [roll_out(algorithm, seed) for seed in range(3)]
    advantages = torch.stack([*map(advantages_of, rollouts)])
    rollouts[1].latents[:, 0] = rollouts[1].final[0] = torch.nan
    rollouts[1], advantages[1, 0] = algorithm.with_temperatures(rollouts[1]), 0.0
    transitions = [
        Transition(0, 1, 3),
        Transition(1, 2, 0),
        Transition(2, 5, 4),
        Transition(1, 4, 2),
        Transition(0, 1, 0),
    ]
    old = torch.stack([old_velocity(rollouts[t.group], t) for t in transitions])
    current = (old + 0.05 * gaussian_noise(old.shape, seed=1)).requires_grad_()
    given = None if "reuse_velocities" in settings else old
    reference = old + 0.1 if "reference_weight" in settings else None
    monkeypatch.setattr(neighbor, "MAX_VALUES", at_once)
    found, metrics = algorithm.losses(rollouts, advantages, transitions, Velocities(current, given, reference))
    (gradient,) = torch.autograd.grad(found.sum(), current)
    for i, t in enumerate(transitions):
        own = Velocities(*(None if v is None else v[i].detach() for v in (current, given, reference)))
        own.current.requires_grad_()
        loss, values = algorithm.loss(rollouts[t.group], advantages[t.group], t, own)
        torch.testing.assert_close(found[i], loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close({k: v[i] for k, v in metrics.items()}, dict(values), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient[i], torch.autograd.grad(loss, own.current)[0], rtol=1e-5, atol=1e-9)
    assert found.isfinite().all()


def test_an_algorithm_without_losses_is_asked_for_one_transition_after_the_other():
    algorithm = make()
    rollouts = [roll_out(algorithm, seed) for seed in range(2)]
    advantages = torch.stack([*map(advantages_of, rollouts)])
    transitions = [Transition(0, 1, 3), Transition(1, 2, 0)]
    old = torch.stack([old_velocity(rollouts[t.group], t) for t in transitions])
    velocities = Velocities(old + 0.1, old)

    class Alone:
        metric_names, loss = algorithm.metric_names, algorithm.loss

    expected = losses(algorithm, rollouts, advantages, transitions, velocities)
    found = losses(Alone(), rollouts, advantages, transitions, velocities)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found, (expected[0], dict(expected[1])))


# Velocities of the rollout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["latent", "clean"])
def test_a_later_update_may_take_its_old_velocities_from_the_rollout(distance: str):
    algorithm, beside = make(distance=distance, reuse_velocities=True), make(distance=distance)
    assert not algorithm.needs_old
    assert beside.needs_old
    rollout, transition = roll_out(algorithm), Transition(0, 2, 3)
    old = old_velocity(rollout, transition)
    assert torch.equal(rollout.velocities[3, 2], old)
    current, advantages = old + 0.1 * gaussian_noise(SHAPE, seed=1), advantages_of(rollout)
    reused = algorithm.loss(rollout, advantages, transition, Velocities(current, None))
    given = beside.loss(rollout, advantages, transition, Velocities(current, old))
    assert reused[0].item() == given[0].item()
    assert reused[1] == given[1]
    assert reused[1]["policy/max_abs_log_ratio"] > 1e-3


def test_a_run_that_reuses_velocities_saves_their_passes_and_learns_the_same(make_config: MakeConfig, tmp_path: Path):
    from ngrpo_lora.training.setup import prepare
    from ngrpo_lora.training.trainer import complete

    adapters, costs = [], []
    for reuse in ("false", "true"):
        common = ["algorithm.updates_per_rollout=2", "trainer.num_iterations=1", "evaluation.num_prompts=1"]
        complete(prepare(make_config(tmp_path / reuse, *common, f"algorithm.reuse_velocities={reuse}")))
        rows = (tmp_path / reuse / "metrics.jsonl").read_text().splitlines()
        costs.append(json.loads(rows[-1])["nfe/old_per_sample"])
        adapters.append(load_file(tmp_path / reuse / "adapter" / FILE_NAME))
    assert costs == [4.5, 4.0]  # half of one trained transition a sample is in the second update
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, rtol=1e-3, atol=1e-4)
    assert any(weight.abs().max() > 5e-3 for name, weight in adapters[1].items() if "lora_B" in name)
