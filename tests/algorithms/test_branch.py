"""BranchGRPO's tree; what it shares with the other SDE baselines is in test_sde.py."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from flows import SHAPE, Counted, algorithm_of, schedule_of, velocity_fn

from ngrpo_lora.config import RolloutConfig, load_config
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.types import RewardBatch

PUBLISHED = RolloutConfig(num_steps=20, group_size=16)
SMALL = RolloutConfig(num_steps=5, group_size=4)  # splits at steps 0 and 3


def batch(rewards: list[list[float]]) -> RewardBatch:
    values = torch.tensor(rewards)
    return RewardBatch(values.nan_to_num(), ~values.isnan(), {})


def test_the_published_tree_takes_203_forward_passes_and_trains_218_edges_in_updates_of_12():
    algorithm, counted = algorithm_of("branch", PUBLISHED), Counted()
    algorithm.rollout(counted, schedule_of(20), SHAPE, [0], 0)
    assert counted.evaluations == 203
    assert [samples for _, samples in counted.calls] == [1] + [2] * 3 + [4] * 3 + [8] * 3 + [16] * 10
    updates = algorithm.updates(torch.ones(1, 20 * 16), seed=0, iteration=0)
    edges = [edge for update in updates for edge in update]
    assert len(edges) == len(set(edges)) == 218
    assert {len(update) for update in updates} == {12, 13}


def test_leaves_share_their_trajectories_up_to_the_split_that_parts_them():
    (rollout,) = algorithm_of("branch", SMALL).rollout(velocity_fn, schedule_of(5), SHAPE, [0], 0)
    together = [[bool(torch.equal(step[a], step[b])) for a, b in ((0, 1), (0, 2))] for step in rollout.latents]
    assert together == [[True, True], [True, False], [True, False], [True, False], [False, False], [False, False]]


def test_noise_is_four_times_as_strong_at_a_split():
    shape = (60, 60)
    (rollout,) = algorithm_of("branch", SMALL).rollout(velocity_fn, schedule_of(5), shape, [0], 0)
    algorithm, schedule = algorithm_of("branch", SMALL), schedule_of(5)
    strengths = []
    for index in range(5):
        step = algorithm.step(rollout.latents[index], rollout.velocities[index], schedule.sigmas, index)
        strengths.append(((rollout.latents[index + 1] - step.mean) / step.std).std().item())
    assert strengths == pytest.approx([4, 1, 1, 4, 1], rel=0.05)


def test_an_edge_has_the_advantage_of_its_node_among_those_of_its_depth():
    (found,) = algorithm_of("branch", SMALL).advantages(batch([[0.0, 2.0, 4.0, 4.0]]))
    depths = found.view(5, 4)
    halves = 0.5**0.5  # two nodes, worth 1 and 4
    for depth in depths[:3]:
        torch.testing.assert_close(depth, torch.tensor([-halves, -halves, halves, halves]).double())
    leaves = torch.tensor([0.0, 2.0, 4.0, 4.0]).double()
    for depth in depths[3:]:
        torch.testing.assert_close(depth, (leaves - 2.5) / leaves.std())


def test_a_failed_leaf_counts_in_no_node():
    (found,) = algorithm_of("branch", SMALL).advantages(batch([[torch.nan, 2.0, 4.0, 5.0]]))
    depths = found.view(5, 4)
    assert depths[0].tolist() == pytest.approx([-(0.5**0.5)] * 2 + [0.5**0.5] * 2)  # worth 2 against 4.5
    assert depths[4, 0] == 0
    torch.testing.assert_close(depths[4, 1:].sum(), torch.tensor(0.0).double(), atol=1e-12, rtol=0)


def test_each_edge_is_trained_once_by_its_first_leaf():
    edges = algorithm_of("branch", SMALL).edges(0, torch.ones(20))
    assert Counter(edge.step for edge in edges) == {0: 2, 1: 2, 2: 2, 3: 4, 4: 4}
    assert {edge.sample for edge in edges if edge.step < 3} == {0, 2}


def test_pruning_leaves_out_late_steps_or_the_paths_of_middling_leaves():
    (advantages,) = algorithm_of("branch", SMALL).advantages(batch([[0.0, 2.0, 4.0, 3.0]]))
    late = algorithm_of("branch", SMALL, pruned_steps=2).edges(0, advantages)
    assert {edge.step for edge in late} == {0, 1, 2}
    extremes = algorithm_of("branch", SMALL, kept_leaves="extremes").edges(0, advantages)
    assert {edge.sample for edge in extremes if edge.step == 4} == {0, 2}
    assert {edge.sample for edge in extremes if edge.step == 0} == {0, 2}
    half = algorithm_of("branch", SMALL, kept_leaves="half").edges(0, advantages)
    assert {edge.sample for edge in half if edge.step == 4} == {2, 3}
    assert {edge.sample for edge in half if edge.step == 0} == {2}


def test_a_failed_leaf_is_kept_by_no_pruning():
    (advantages,) = algorithm_of("branch", SMALL).advantages(batch([[0.1, torch.nan, 0.2, 0.6]]))
    half = algorithm_of("branch", SMALL, kept_leaves="half").edges(0, advantages)
    assert {edge.sample for edge in half if edge.step == 4} == {2, 3}
    every = algorithm_of("branch", SMALL).edges(0, advantages)
    assert {edge.sample for edge in every if edge.step == 4} == {0, 2, 3}


def test_nodes_of_equal_worth_have_no_advantage_however_their_sums_round():
    (advantages,) = algorithm_of("branch", SMALL).advantages(batch([[0.1, 0.7, 0.2, 0.6]]))  # 0.4 and 0.4
    assert not advantages.view(5, 4)[:3].any()
    assert {edge.step for edge in algorithm_of("branch", SMALL).edges(0, advantages)} == {3, 4}


def test_a_tree_without_advantages_gives_no_edge():
    algorithm = algorithm_of("branch", SMALL)
    advantages = algorithm.advantages(batch([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]]))
    updates = algorithm.updates(advantages, seed=0, iteration=0)
    assert {edge.group for update in updates for edge in update} == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rollout.group_size=12"], "rollout.group_size must be one of 2, 4, 8 with .* got 12; take one of these"),
        (["rollout.group_size=16"], "rollout.group_size must be one of 2, 4, 8 with .* got 16; take one of these"),
        (
            ["rollout.group_size=8", "rollout.prompts_per_iteration=1", "algorithm.updates_per_rollout=35"],
            "algorithm.updates_per_rollout must be at most the edges of an iteration .34., got 35; lower it",
        ),
        (["rollout.group_size=4", "algorithm.pruned_steps=8"], "algorithm.pruned_steps must be less .*got 8"),
        (
            ["rollout.group_size=4", "algorithm.kept_leaves=best"],
            "algorithm.kept_leaves must be .all., .half. or .extremes., got .best.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["algorithm=branch", "rollout.num_steps=8", *settings])
