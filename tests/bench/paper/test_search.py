"""The search: which point wins, and what is written of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paper_runs import cost_of_8, leave, small_plan

from ngrpo_lora.bench.paper import search
from ngrpo_lora.bench.paper.methods import METHODS
from ngrpo_lora.bench.paper.plan import points, search_jobs
from ngrpo_lora.bench.paper.tables import search_table
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.statistics import Estimate

METHOD = next(method for method in METHODS if method.name == "flow-grpo")


def test_the_greatest_reward_wins_and_of_equal_ones_the_lowest_rate():
    grid = points(METHOD)
    rewards = dict.fromkeys(grid, Estimate(0.5, 0.4, 0.6))
    assert search.choose(METHOD, rewards) == grid[0]
    assert search.choose(METHOD, rewards | {grid[3]: Estimate(0.6, 0.0, 1.2)}) == grid[3]
    assert search.choose(METHOD, dict.fromkeys(grid, search.NONE) | {grid[2]: Estimate(0.1, 0.0, 0.2)}) == grid[2]
    assert search.choose(METHOD, {}) is None


def test_winners_and_all_points_are_written_and_shown(tmp_path: Path):
    plan = small_plan(tmp_path, "flow-grpo", profile="default", budget=400.0)
    jobs = search_jobs(plan, cost_of_8)
    assert len(jobs) == 6
    for number, job in enumerate(jobs[:-1]):  # the last one failed
        leave(job, lambda picture, step, number=number: 0.5 + 0.1 * (number == 2) + 0.01 * (picture == 0))
    winners = search.tuned(plan, jobs)
    assert winners == {"flow-grpo": points(METHOD)[2]}
    (entry,) = search.write(plan, jobs, winners)
    assert json.loads((tmp_path / search.FILE).read_text()) == [entry]
    assert [point["validation_reward"] for point in entry["points"]][-1] is None
    table = search_table([entry])
    assert [row[-1] for row in table.rows] == ["", "", "yes", "", "", ""]
    assert table.rows[2][3] == "0.602 ± 0.006"  # 2.78 times 0.002, the standard error of five scenes
    assert table.rows[-1][3] == "failed or missing"


def test_a_winner_stays_once_runs_of_the_tables_have_begun(tmp_path: Path):
    plan = small_plan(tmp_path, "flow-grpo", "dance", profile="default", budget=400.0)
    jobs = search_jobs(plan, cost_of_8)
    for number, job in enumerate(jobs[:-1]):
        leave(job, lambda picture, step, number=number: 0.5 + 0.1 * (number % 6 == 2))
    search.write(plan, jobs, search.tuned(plan, jobs))
    assert search.kept(plan) == {}
    (tmp_path / "runs" / "dance" / "seed-0").mkdir(parents=True)
    leave(jobs[-1], lambda picture, step: 0.9)  # of dance, at last
    dance = next(method for method in METHODS if method.name == "dance")
    assert search.kept(plan) == {"dance": points(dance)[2]} == {"dance": search.tuned(plan, jobs)["dance"]}
    alone = small_plan(tmp_path, "flow-grpo", profile="default", budget=400.0)
    search.write(alone, jobs[:6], search.tuned(alone, jobs[:6]))
    assert search.kept(plan).keys() == {"dance"}  # another command's methods are not forgotten


def test_several_rewards_are_judged_by_their_weighted_sum(tmp_path: Path):
    both = ("rewards=[world, {name: world_strict, weight: 2}]", "evaluation.strict=null")
    plan = small_plan(tmp_path, "flow-grpo", profile="default", budget=400.0, settings=both)
    jobs = search_jobs(plan, cost_of_8)
    leave(jobs[0], lambda picture, step: 0.6)  # world_strict is 1
    assert search.validated(jobs)["flow-grpo"][jobs[0].point].value == pytest.approx(0.6 + 2 * 1.0)


def test_a_damaged_file_is_refused(tmp_path: Path):
    (tmp_path / search.FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"must hold the winners of the search as JSON.*remove it"):
        search.kept(small_plan(tmp_path, "flow-grpo", profile="default"))


def test_without_a_search_a_methods_own_values_are_used(tmp_path: Path):
    plan = small_plan(tmp_path, "flow-grpo")
    winners = search.tuned(plan, [])
    assert winners == {"flow-grpo": METHOD.untuned}
    assert search_table(search.write(plan, [], winners)).rows[0][3] == "not searched"
