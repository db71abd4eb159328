"""What an iteration costs: the counts of each method's own paper, and those of a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import FinishedRun
from paper_runs import small_plan

from ngrpo_lora.bench.paper.cost import cost_of, length, total
from ngrpo_lora.bench.paper.methods import METHODS
from ngrpo_lora.bench.paper.plan import _config
from ngrpo_lora.config import RunConfig, load_config
from ngrpo_lora.records.metrics import read_metrics

BY_NAME = {method.name: method for method in METHODS}


def config_of(name: str, tmp_path: Path) -> RunConfig:
    return _config(small_plan(tmp_path, name), BY_NAME[name], name, 0, BY_NAME[name].untuned)


@pytest.mark.parametrize(
    ("name", "old", "theta"),
    [
        ("neighbor-ddim-25", 25, 4.0),
        ("neighbor-dpmpp-16", 16, 3.0),
        ("neighbor-dpmpp-8", 8, 4 / 3),
        ("flow-grpo", 10, 9.0),
        ("flow-cps", 10, 9.0),
        ("flow-cps-3", 10, 3.0),
        ("grpo-guard", 10, 9.0),
        ("dance", 25, 14.0),
        ("dance-16", 16, 9.0),
        ("mix", 25, 4.0),
        ("mix-flash-frozen", 8, 4.0),
        ("branch", 203 / 16, 218 / 16),  # the passes and edges of a tree of 16 leaves
    ],
)
def test_foreseen_function_evaluations_are_the_papers(name: str, old: float, theta: float, tmp_path: Path):
    cost = cost_of(config_of(name, tmp_path))
    assert cost.theta == pytest.approx(theta)
    assert cost.old == pytest.approx(old)
    assert cost.total == pytest.approx(cost.old + 3 * theta) == total(cost.old, theta)


def test_a_reference_costs_a_forward_pass_a_transition():
    without, beside = (
        cost_of(load_config(None, ["algorithm.min_reward_spread=0", f"algorithm.reference_weight={weight}"]))
        for weight in (0, 0.5)
    )
    assert beside.theta == without.theta
    assert beside.old == pytest.approx(without.old + without.theta)


def test_what_a_run_counts_is_what_is_foreseen(finished_run: FinishedRun):
    rows = read_metrics(finished_run.output_dir / "metrics.jsonl")[1:]
    full = [row for row in rows if row["rollout/zero_spread_share"] == 0]
    assert full
    foreseen = cost_of(finished_run.run.config)
    for row in full:
        assert row["nfe/old_per_sample"] == pytest.approx(foreseen.old)
        assert row["nfe/theta_per_sample"] == pytest.approx(foreseen.theta)


def test_a_window_that_moves_is_priced_as_it_moves(tmp_path: Path):
    config = config_of("mix-flash", tmp_path)
    iterations, mean = length(config, 2400)
    foreseen = sum(cost_of(config, iteration).total for iteration in range(iterations))
    assert cost_of(config, 0).total != cost_of(config, iterations - 1).total
    assert iterations * mean == pytest.approx(foreseen, abs=mean)


def test_the_length_is_what_a_budget_allows(tmp_path: Path):
    config = config_of("neighbor-dpmpp-8", tmp_path)  # 12 forward passes per sample
    assert length(config, 120) == (10, pytest.approx(12))
    assert length(config, 131.9) == (10, pytest.approx(12))
    assert length(config, 1) == (1, pytest.approx(12))
