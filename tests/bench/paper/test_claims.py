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


def claims(
    folder: Path,
    score: Callable[[str, int, int, int], float],
    *names: str,
    tables: tuple[int, ...] = (1,),
    seeds: int = 1,
) -> Table:
    plan = small_plan(folder, *names, budget=400.0, tables=tables, seeds=seeds)
    jobs = jobs_of(plan)
    for job in jobs:
        leave(job, lambda picture, step, job=job: score(job.method, picture, step, job.seed))
    table = claims_table(read(jobs), plan.budget)
    assert table is not None
    return table


def row(table: Table, start: str) -> tuple[str, ...]:
    (found,) = (row for row in table.rows if row[0].startswith(start))
    return found


def test_every_claim_is_about_methods_of_one_table():
    for pair in PAIRS:
        assert any({pair.one, pair.other} <= {method.name for method in rows} for rows in TABLES.values()), pair


def test_time_and_compute_against_dance(tmp_path: Path):
    # DanceGRPO has 10 iterations of 40 forward passes, and 0.6 at the end, which Neighbor GRPO passes by iteration 12.
    gain = {"neighbor-dpmpp-8": 0.0085, "dance": 0.01}
    table = claims(tmp_path, lambda method, picture, step, seed: 0.5 + gain[method] * step, "neighbor-dpmpp-8", "dance")
    time, compute = table.rows[:2]
    assert time[2] == "1.0 times (1.0 to 1.0); 4.0 times the forward passes"
    assert time[3] == "does not hold"
    assert compute[2] == "0.30 of it"
    assert compute[3] == "does not hold"


def test_a_reward_that_is_not_reached_is_said(tmp_path: Path):
    gain = {"neighbor-dpmpp-8": 0.0, "dance": 0.01}
    table = claims(tmp_path, lambda method, picture, step, seed: 0.5 + gain[method] * step, "neighbor-dpmpp-8", "dance")
    assert table.rows[1][2:] == ("not reached", "does not hold")


def test_seeds_are_counted_where_they_differ(tmp_path: Path):
    def score(method: str, picture: int, step: int, seed: int) -> float:
        return 0.5 + step * (0.01 if method == "dance" else 0.1 if seed else 0.0)

    table = claims(tmp_path, score, "neighbor-dpmpp-8", "dance", seeds=2)
    assert table.rows[1][2:] == ("not reached, 0.10 of it", "on 1 of 2 seeds")


@pytest.mark.parametrize(("better", "said"), [(0.005, "holds"), (-0.005, "contradicted"), (0.0, "not settled")])
def test_a_difference_is_at_equal_compute_and_on_the_prompts_it_is_about(tmp_path: Path, better: float, said: str):
    def score(method: str, picture: int, step: int, seed: int) -> float:
        left_out = picture >= 3
        return 0.5 + (better * step * (1 + 0.01 * picture) if left_out and method != "dance" else 0.0)

    table = claims(tmp_path, score, "neighbor-dpmpp-8", "dance")
    trained, left_out = (
        row(table, "better than DanceGRPO on what is trained"),
        row(table, "better than DanceGRPO on what is not"),
    )
    assert trained[3] == "not settled"
    assert trained[2].startswith("+0.000")
    assert left_out[3] == said
    assert left_out[2].startswith(f"{better * 40 * 1.035:+.3f}")


def test_alike_is_after_as_many_iterations(tmp_path: Path):
    def score(method: str, picture: int, step: int, seed: int) -> float:
        return 0.5 + 0.01 * step + 0.0001 * picture * (picture - 2) * (method == "anchors-1")

    names = ("neighbor-dpmpp-8",)
    (found,) = claims(tmp_path, score, *names, tables=(5,)).rows
    assert found[0].startswith("1 anchor is as good as 12")
    assert found[3] == "holds, within these intervals"


def test_verdicts():
    above, over, below = Estimate(0.2, 0.1, 0.3), Estimate(0.1, -0.1, 0.3), Estimate(-0.2, -0.3, -0.1)
    unknown = Estimate(0.1, math.nan, math.nan)
    assert [verdict([one], alike=False) for one in (above, over, below, unknown)] == [
        "holds",
        "not settled",
        "contradicted",
        "not settled",
    ]
    assert verdict([above, over], alike=False) == "not settled"
    assert verdict([over, over], alike=True).startswith("holds")
    assert verdict([over, above], alike=True) == verdict([below], alike=True) == "does not hold"
