"""Tables from run folders."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from paper_runs import jobs_of, leave, small_plan

from ngrpo_lora.bench.paper.outcomes import read
from ngrpo_lora.bench.paper.reached import crossing
from ngrpo_lora.bench.paper.tables import Table, make_tables, over_seeds


def tables(tmp_path: Path, *names: str, **asked: object) -> list[Table]:
    plan = small_plan(tmp_path, *names, budget=400.0, **asked)  # pyright: ignore
    jobs = jobs_of(plan)
    for job in jobs:
        gain = 0.002 if "neighbor" in job.name else 0.001
        leave(job, lambda picture, step, gain=gain: 0.4 + 0.05 * picture + gain * step * (1 + picture))
    return make_tables(plan, read(jobs))


def cell(table: Table, row: str, column: str) -> str:
    (line,) = (line for line in table.rows if line[0] == row)
    return line[table.head.index(column)]


def test_table_1_is_at_equal_compute_and_once_more_at_equal_iterations(tmp_path: Path):
    equal_compute, equal_iterations, gains, pairs, cost = tables(tmp_path)
    neighbor = "Neighbor GRPO, DPM++ 8"
    assert cell(equal_compute, neighbor, "iterations") == "40"
    assert cell(equal_compute, "Flow-GRPO", "iterations") == "10"
    assert (
        cell(equal_compute, neighbor, "forward passes") == cell(equal_compute, "Flow-GRPO", "forward passes") == "400"
    )
    # Trained are the first three pictures: 0.45 before, and 0.002 * 40 * 2 more after 40 iterations.
    assert cell(equal_compute, "base model", "reward, trained tasks") == "0.450"
    assert cell(equal_compute, neighbor, "reward, trained tasks").startswith("0.610 (+0.160 [")
    assert cell(equal_compute, "Flow-GRPO", "reward, left-out tasks").startswith("0.620 (+0.045 [")
    assert cell(equal_iterations, neighbor, "reward, trained tasks").startswith("0.466 (+0.016 [")
    assert cell(equal_iterations, "Flow-GRPO", "forward passes per sample") == "160"
    assert [cell(equal_compute, row, "hue_bits") for row in ("base model", neighbor, "Flow-GRPO")] == [
        "2",
        "1.6",
        "1.9",
    ]
    assert not {"strict_accuracy", "world_mean"} & {*equal_compute.head}
    assert cell(equal_compute, neighbor, "HPSv2.1 (paper)") == "0.366"
    assert cell(equal_compute, "Flow-GRPO", "HPSv2.1 (paper)") == ""
    # The reward grows by 0.006 an iteration of 10 forward passes and 1.75 s, and by 0.003 of 40.
    assert cell(gains, neighbor, "+0.08") == "133 (23 s)"
    assert [cell(gains, "Flow-GRPO", f"+{gain}") for gain in (0.02, 0.04)] == ["267 (12 s)", "not reached"]
    world = next(row for row in pairs.rows if row[1] == "world")
    assert world[0] == "Flow-GRPO"
    assert world[2].startswith("-0.210 [")  # (0.001 * 10 - 0.002 * 40) * 3 on average
    assert world[3].startswith("0%")
    assert cell(cost, neighbor, "NFE_old (paper)") == "8"
    assert cell(cost, neighbor, "B") == "4"
    assert cell(cost, "Flow-GRPO", "B") == cell(cost, "Flow-GRPO", "K") == ""
    assert cell(cost, neighbor, "K") == "4"
    assert cell(equal_compute, neighbor, "pictures") == str(40 * 48)
    assert cell(equal_compute, neighbor, "seeds") == "1"
    assert cell(cost, neighbor, "s/iter.") == "1.75"


def test_seeds_have_intervals_of_their_own(tmp_path: Path):
    first, _, _, pairs, _ = tables(tmp_path, seeds=2)
    assert "seeds [-0.210, -0.210]" in next(row for row in pairs.rows if row[1] == "world")[2]
    assert "seeds [+0.160, +0.160]" in cell(first, "Neighbor GRPO, DPM++ 8", "reward, trained tasks")
    assert "over seeds" in first.about


def test_differences_between_methods_have_an_interval_over_seeds():
    """Scores stand seed after seed: of two pictures, seeds whose differences are 0.1, 0.2 and 0.3 in the mean."""
    ours, theirs = [0.2, 0.0, 0.3, 0.1, math.nan, 0.3], [0.0] * 6
    half = 4.302652729749464 * 0.1 / math.sqrt(3)
    assert over_seeds(ours, theirs, 3) == f", seeds [{0.2 - half:+.3f}, {0.2 + half:+.3f}]"
    assert over_seeds(ours, theirs, 1) == ""


def test_an_ablation_has_the_papers_rows(tmp_path: Path):
    (table,) = tables(tmp_path, "neighbor-dpmpp-8", tables=(5,))
    assert [row[0] for row in table.rows] == ["1", "2", "4", "8", "12"]
    assert cell(table, "8", "Unified. (paper)") == "3.187"


def test_a_table_shows_what_is_complete(tmp_path: Path):
    plan = small_plan(tmp_path, budget=400.0)
    flow = next(job for job in jobs_of(plan) if job.method == "flow-grpo")
    leave(flow, lambda picture, step: 0.5)
    first = make_tables(plan, read(jobs_of(plan)))[0]
    assert [row[0] for row in first.rows] == ["base model", "Flow-GRPO"]
    assert make_tables(plan, []) == []


def test_markdown_keeps_its_columns():
    lines = Table("T", "about", ("a", "b"), (("x|y", "z"),)).markdown().splitlines()
    assert lines[-1] == "| x\\|y | z |"


def test_a_picture_without_a_reward_leaves_the_others_to_tell_what_a_gain_costs(tmp_path: Path):
    plan = small_plan(tmp_path, "neighbor-dpmpp-8", budget=400.0)
    (job,) = jobs_of(plan)
    leave(job, lambda picture, step: math.nan if picture == 0 else 0.4 + 0.01 * step)
    (outcome,) = read([job])
    passes, seconds = crossing(outcome, 0.02) or (math.nan, math.nan)
    assert (passes, seconds) == (pytest.approx(20), pytest.approx(3.5))  # after two iterations


def test_a_batch_is_what_the_runs_have_drawn(tmp_path: Path):
    settings = ("rollout.prompts_per_iteration=0x4", "rollout.group_size=16")
    assert "the 64 places" in tables(tmp_path, settings=settings)[0].about
