"""What is said of the paper's claims, from run folders."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from paper_runs import jobs_of, leave, small_plan

from ngrpo_lora.bench.paper.claims import PAIRS, claims_table, verdict
from ngrpo_lora.bench.paper.methods import TABLES
from ngrpo_lora.bench.paper.outcomes import read
from ngrpo_lora.bench.paper.tables import Table
from ngrpo_lora.evaluation.statistics import Estimate

Score = Callable[[str, int, int, int], float]
"""The reward of a method's held-out picture after an iteration of a seed's run."""

TRAINED = "better than DanceGRPO (25 steps) on trained tasks"
BOTH = ("neighbor-dpmpp-8", "dance")


def claims(
    folder: Path,
    score: Score,
    *names: str,
    table: int = 1,
    profile: str = "default",
    only: tuple[str, ...] = (),
    missing: int = 0,
    **asked: int,
) -> Table:
    """The claims of runs of the methods named; `only` are variants that have run, `missing` how many runs have not."""
    plan = small_plan(folder, *names, profile=profile, budget=400.0, tables=(table,), **{"seeds": 3} | asked)
    jobs = [job for job in jobs_of(plan) if not only or job.method in only]
    for job in jobs[: len(jobs) - missing]:
        leave(job, lambda picture, step, job=job: score(job.method, picture, step, job.seed))
    found = claims_table(plan, read(jobs))
    assert found is not None
    return found


def gains(**each: float) -> Score:
    """0.5, and the same gain of every picture in every iteration, by the beginning of the method's name."""
    return lambda method, picture, step, seed: 0.5 + each[method.partition("-")[0]] * step


def row(table: Table, start: str) -> tuple[str, ...]:
    (found,) = (row for row in table.rows if row[0].startswith(start))
    return found


def test_every_claim_is_about_methods_of_one_table():
    for pair in PAIRS:
        assert any({pair.first, pair.second} <= {method.name for method in rows} for rows in TABLES.values()), pair


def test_time_and_compute_against_dance(tmp_path: Path):
    # DanceGRPO has 10 iterations of 40 forward passes, and 0.6 at the end, which Neighbor GRPO passes by iteration 12.
    time, compute = claims(tmp_path, gains(neighbor=0.0085, dance=0.01), *BOTH).rows[:2]
    assert time[2] == "1.0 times (1.0 to 1.0), rewards and decoding included; 4.0 times the forward passes"
    assert time[1] == "does not hold"
    assert compute[1:3] == ("does not hold", "0.30 of it, 0.30 of it, 0.30 of it")


def test_a_reward_that_is_not_reached_is_said(tmp_path: Path):
    compute = claims(tmp_path, gains(neighbor=0.0, dance=0.01), *BOTH).rows[1]
    assert compute[1:3] == ("does not hold", "not reached, not reached, not reached")


def test_a_reward_is_reached_where_it_stays(tmp_path: Path):
    def score(method: str, picture: int, step: int, seed: int) -> float:
        return 0.5 + (0.01 * step if method == "dance" else 0.2 if step in (8, 20) or step >= 32 else 0.0)

    assert claims(tmp_path, score, *BOTH).rows[1][2].startswith("0.80 of it")


def test_to_reach_a_reward_that_is_no_better_than_the_base_says_nothing(tmp_path: Path):
    compute = claims(tmp_path, gains(neighbor=-0.001, dance=-0.01), *BOTH).rows[1]
    assert compute[1:3] == ("not settled", "DanceGRPO has not improved")


def test_seeds_are_counted_where_they_differ(tmp_path: Path):
    def score(method: str, picture: int, step: int, seed: int) -> float:
        return 0.5 + step * (0.01 if method == "dance" else 0.1 if seed == 1 else 0.0)

    assert claims(tmp_path, score, *BOTH).rows[1][1:3] == ("on 1 of 3 seeds", "not reached, 0.10 of it, not reached")


@pytest.mark.parametrize(("better", "said"), [(0.005, "holds"), (-0.005, "does not hold"), (0.0, "not settled")])
def test_a_difference_is_at_equal_compute_and_on_the_prompts_it_is_about(tmp_path: Path, better: float, said: str):
    def score(method: str, picture: int, step: int, seed: int) -> float:
        more = better * step * (1 + 0.01 * picture + 0.01 * seed)
        return 0.5 + (more if picture >= 3 and method != "dance" else 0.0)

    table = claims(tmp_path, score, *BOTH)
    trained, left_out = (row(table, f"better than DanceGRPO (25 steps) on {which}") for which in ("trained", "tasks"))
    assert trained[1] == "not settled"
    assert trained[2].startswith("+0.000")
    assert left_out[1] == said
    assert left_out[2].startswith(f"{better * 40 * 1.045:+.3f}")


@pytest.mark.parametrize(
    ("other", "label"),
    [
        ("dance", "DanceGRPO (25 steps)"),
        ("flow-grpo", "Flow-GRPO (10 steps)"),
        ("flow-cps", "Flow-CPS"),
        ("mix-flash", "MixGRPO-Flash"),
        ("branch", "BranchGRPO"),
    ],
)
def test_better_on_every_seed_is_not_settled_where_seeds_differ_as_much(tmp_path: Path, other: str, label: str):
    """Over pictures a gain of 0.06 is beyond doubt; over seeds whose gains are 0.01, 0.05 and 0.12 it is not."""

    def score(method: str, picture: int, step: int, seed: int) -> float:
        return 0.5 + 1e-4 * picture + (step > 0) * (method != other) * (0.01, 0.05, 0.12)[seed]

    found = row(claims(tmp_path, score, "neighbor-dpmpp-8", other), f"better than {label}, all tasks")
    assert found[1] == "not settled"
    assert found[2].startswith("+0.060 [+0.060, +0.060], seeds [-")


def test_one_seed_is_said_and_seeds_that_are_missing_settle_nothing(tmp_path: Path):
    better = gains(neighbor=0.01, dance=0.0)
    assert row(claims(tmp_path / "one", better, *BOTH, seeds=1), TRAINED)[1] == "holds, on one seed alone"
    assert row(claims(tmp_path / "two", better, *BOTH, missing=1), TRAINED)[1] == "no verdict: 2 of 3 seeds"


def test_without_a_search_there_is_no_verdict(tmp_path: Path):
    table = claims(tmp_path, gains(neighbor=0.01, dance=0.0), *BOTH, profile="quick")
    assert row(table, TRAINED)[1].startswith("no verdict: learning rates were not searched")


def test_methods_without_a_seed_in_common_have_no_claim(tmp_path: Path):
    plan = small_plan(tmp_path, *BOTH, profile="default", budget=400.0, seeds=2)
    jobs = [job for job in jobs_of(plan) if job.seed == (job.method == "dance")]
    for job in jobs:
        leave(job, lambda picture, step: 0.5)
    assert claims_table(plan, read(jobs)) is None


def test_as_good_is_after_as_many_iterations_and_allows_a_small_loss(tmp_path: Path):
    def anchors(loss: float) -> Score:
        return lambda method, picture, step, seed: 0.5 + 0.01 * step - (loss + 1e-4 * picture) * (method == "anchors-1")

    for loss, said in ((0.01, "holds"), (-0.2, "holds"), (0.1, "does not hold")):
        ends = ("anchors-1", "anchors-12")
        table = claims(tmp_path / str(loss), anchors(loss), "neighbor-dpmpp-8", table=5, only=ends)
        found = row(table, "1 anchor is as good as 12")
        assert found[2].startswith(f"{-loss - 2e-4:+.3f}")
        assert found[1] == said


def test_what_is_left_at_equal_vividness(tmp_path: Path):
    # The runs' one reward here is the verifier's name: of p = 2 the evaluation counts that is no higher than p = 0.8's.
    def score(method: str, picture: int, step: int, seed: int) -> float:
        return 0.5 + step * {"vivid-p-0.8": 0.001, "vivid-p-2": 0.004}.get(method, 0.0)

    table = claims(tmp_path, score, "neighbor-dpmpp-8", table=2, only=("vivid-p-0.8", "vivid-p-2"))
    assert row(table, "p = 0.8")[2].startswith("+0.008")  # 0.001 * 40 - 0.004 * 8


def test_verdicts():
    above, over, below = Estimate(0.2, 0.1, 0.3), Estimate(0.1, -0.1, 0.3), Estimate(-0.2, -0.3, -0.1)
    little, unknown = Estimate(0.0, -0.01, 0.01), Estimate(0.1, math.nan, math.nan)
    better = [verdict([one], as_good=False) for one in (above, over, below, little, unknown)]
    assert better == ["holds", "not settled", "does not hold", "not settled", "not settled"]
    as_good = [verdict([one], as_good=True) for one in (above, over, below, little)]
    assert as_good == ["holds", "not settled", "does not hold", "holds"]
    assert verdict([above, over], as_good=False) == verdict([below, over], as_good=True) == "not settled"
