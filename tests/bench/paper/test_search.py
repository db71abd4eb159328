"""The search: which point wins, and what is written of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from paper_runs import cost_of_8, leave, small_plan

from ngrpo_lora.bench.paper import search
from ngrpo_lora.bench.paper.methods import METHODS
from ngrpo_lora.bench.paper.outcomes import is_complete
from ngrpo_lora.bench.paper.plan import Plan, points
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


def rewarded(**rewards: float) -> dict[search.Point, Estimate]:
    """Rewards of points by learning rate, as in `r1e_3=0.5`, with the usual clip."""
    usual = METHOD.untuned[1]
    return {(name[1:].replace("_", "-"), usual): Estimate(value, value, value) for name, value in rewards.items()}


@pytest.mark.parametrize(
    ("found", "rates", "knobs"),
    [
        (rewarded(), "3e-4 1e-3 3e-3", ""),
        (rewarded(r3e_4=0.1, r1e_3=0.2), "3e-4 1e-3 3e-3", ""),  # the third is under way
        (rewarded(r3e_4=0.1, r1e_3=0.2, r3e_3=0.1), "3e-4 1e-3 3e-3", "1e-3"),
        (rewarded(r3e_4=0.1, r1e_3=0.2, r3e_3=0.3), "3e-4 1e-3 3e-3 1e-2", ""),
        (rewarded(r3e_4=0.1, r1e_3=0.2, r3e_3=0.3, r1e_2=0.4), "3e-4 1e-3 3e-3 1e-2", "1e-2"),
        (rewarded(r3e_4=0.2, r1e_3=0.2, r3e_3=0.1), "1e-4 3e-4 1e-3 3e-3", ""),
        (rewarded(r1e_4=0.1, r3e_4=0.2, r1e_3=0.2, r3e_3=0.1), "1e-4 3e-4 1e-3 3e-3", "3e-4"),
        (rewarded(r3e_4=math.nan, r1e_3=math.nan, r3e_3=math.nan), "3e-4 1e-3 3e-3", ""),
    ],
)
def test_the_search_goes_on_beyond_its_edges_and_then_to_the_knob(
    found: dict[search.Point, Estimate], rates: str, knobs: str
):
    usual = METHOD.untuned[1]
    (other,) = (knob for knob in METHOD.knob_values if knob != usual)
    expected = {(rate, usual) for rate in rates.split()} | {(rate, other) for rate in knobs.split()}
    tried = search.trials(METHOD, found)
    assert (set(tried), len(tried)) == (expected, len(expected))
    assert tried == [point for point in points(METHOD) if point in expected]


@pytest.mark.parametrize(
    ("short", "whole", "rates"),
    [
        (rewarded(r3e_4=0.1, r1e_3=0.2), {}, ""),  # a short run is under way
        (rewarded(r3e_4=0.1, r1e_3=0.3, r3e_3=0.2), {}, "1e-3 3e-4"),
        (rewarded(r3e_4=0.1, r1e_3=0.3, r3e_3=0.2), rewarded(r1e_3=0.4), "1e-3 3e-4"),
        (rewarded(r3e_4=0.1, r1e_3=0.3, r3e_3=0.2), rewarded(r1e_3=0.4, r3e_4=0.3), "1e-3 3e-4"),
        (rewarded(r3e_4=0.1, r1e_3=0.3, r3e_3=0.2), rewarded(r1e_3=0.4, r3e_4=0.5), "1e-3 3e-4 1e-4"),
        (rewarded(r3e_4=0.1, r1e_3=0.3, r3e_3=0.2), rewarded(r1e_3=math.nan, r3e_4=0.5), "1e-3 3e-4 1e-4"),
        (rewarded(r3e_4=0.1, r1e_3=0.3, r3e_3=0.2), rewarded(r1e_3=0.4, r3e_4=0.5, r1e_4=0.6), "1e-3 3e-4 1e-4"),
        (rewarded(r1e_4=0.4, r3e_4=0.3, r1e_3=0.2, r3e_3=0.1), {}, "1e-4"),  # there is none below
        (rewarded(r3e_4=math.nan, r1e_3=math.nan, r3e_3=math.nan), {}, ""),
    ],
)
def test_the_best_short_run_and_lower_rates_go_the_whole_length(
    short: dict[search.Point, Estimate], whole: dict[search.Point, Estimate], rates: str
):
    usual = METHOD.untuned[1]
    (other,) = (knob for knob in METHOD.knob_values if knob != usual)
    ends = {(rate, other): search.NONE for rate, _ in short}  # the knob's other value has failed at each
    short = short if len(short) < 3 else short | ends
    assert search.finals(METHOD, short, whole) == [(rate, usual) for rate in rates.split()]


def test_a_rate_that_a_long_run_does_not_survive_is_not_chosen(tmp_path: Path):
    plan = small_plan(tmp_path, "flow-grpo", profile="default", budget=4000.0)
    while jobs := [job for job in search.jobs(plan, cost_of_8) if not is_complete(job)]:
        for job in jobs:
            rate = float(job.point[0])
            reward = 0.9 - 100 * rate if job.whole else 0.8 - 100 * abs(rate - 3e-3)
            reward -= 0.01 * (job.point[1] != "1e-3")
            leave(job, lambda picture, step, reward=reward: reward)
    jobs = search.jobs(plan, cost_of_8)
    long = [job for job in jobs if job.whole]
    assert [job.point[0] for job in long] == ["1e-4", "3e-4", "1e-3", "3e-3"]  # with 3e-3 the best of the short ones
    assert {job.config.trainer.num_iterations for job in long} == {100}
    assert {job.config.trainer.num_iterations for job in jobs if not job.whole} == {25}
    assert search.tuned(plan, jobs) == {"flow-grpo": ("1e-4", "1e-3")}
    (entry,) = search.write(plan, jobs, search.tuned(plan, jobs))
    shown = {(row[1], row[2]): row[3:] for row in search_table([entry]).rows}
    assert shown["1e-4", "clip_range 1e-3"] == ("", "0.890 ± 0.000", "at the edge")
    assert [shown[rate, "clip_range 1e-3"][0][:5] for rate in ("3e-4", "1e-3", "3e-3")] == ["0.530", "0.600", "0.800"]


def test_each_method_has_its_own_winner(tmp_path: Path):
    plan = small_plan(tmp_path, "flow-grpo", "nft", profile="default", budget=4000.0)
    best, knobs = {"flow-grpo": "3e-4", "nft": "1e-3"}, {method.name: method.untuned[1] for method in METHODS}
    while jobs := [job for job in search.jobs(plan, cost_of_8) if not is_complete(job)]:
        for job in jobs:
            reward = 0.5 + 0.2 * (job.point == (best[job.method], knobs[job.method]))
            leave(job, lambda picture, step, reward=reward: reward)
    winners = search.tuned(plan, search.jobs(plan, cost_of_8))
    assert winners == {name: (rate, knobs[name]) for name, rate in best.items()}


def test_winners_and_all_points_are_written_and_shown(tmp_path: Path):
    plan = small_plan(tmp_path, "flow-grpo", profile="default", budget=400.0)
    jobs = search.jobs(plan, cost_of_8)
    for job in jobs[:-1]:  # the last one failed
        leave(job, lambda picture, step, job=job: 0.5 + 0.1 * (job.point[0] == "1e-3") + 0.01 * (picture == 0))
    jobs = search.jobs(plan, cost_of_8, [jobs[-1].name])
    assert len(jobs) == 4
    leave(jobs[1], lambda picture, step: 0.55)
    winners = search.tuned(plan, jobs)
    assert winners == {"flow-grpo": ("1e-3", "1e-3")}
    (entry,) = search.write(plan, jobs, winners)
    assert json.loads((tmp_path / search.FILE).read_text()) == [entry]
    assert [point["validation_reward"] for point in entry["points"]][-1] is None
    table = search_table([entry])
    assert [row[-1] for row in table.rows] == ["", "", "yes", ""]
    assert table.rows[2][3] == "0.602 ± 0.006"  # 2.78 times 0.002, the standard error of five scenes
    assert table.rows[-1][3] == "failed or missing"


def test_a_winner_at_the_end_of_the_rates_is_marked(tmp_path: Path):
    plan = small_plan(tmp_path, "flow-grpo", profile="default", budget=400.0)
    while jobs := [job for job in search.jobs(plan, cost_of_8) if not is_complete(job)]:
        for job in jobs:
            leave(job, lambda picture, step, job=job: min(0.9, 0.5 + float(job.point[0])))
    jobs = search.jobs(plan, cost_of_8)
    table = search_table(search.write(plan, jobs, search.tuned(plan, jobs)))
    assert [(row[1], row[-1]) for row in table.rows if row[-1]] == [("1e-2", "at the edge")]


def test_a_winner_stays_once_runs_of_the_tables_have_begun(tmp_path: Path):
    plan = small_plan(tmp_path, "flow-grpo", "dance", profile="default", budget=400.0)
    jobs = search.jobs(plan, cost_of_8)
    for job in jobs[:-1]:
        leave(job, lambda picture, step, job=job: 0.5 + 0.1 * (job.point[0] == "1e-3"))
    search.write(plan, jobs, search.tuned(plan, jobs))
    assert search.kept(plan) == {}
    (tmp_path / "runs" / "dance" / "seed-0").mkdir(parents=True)
    leave(jobs[-1], lambda picture, step: 0.9)  # of dance, at last
    assert search.kept(plan) == {"dance": ("1e-3", "1e-3")} == {"dance": search.tuned(plan, jobs)["dance"]}
    alone = small_plan(tmp_path, "flow-grpo", profile="default", budget=400.0)
    search.write(alone, jobs[:3], search.tuned(alone, jobs[:3]))
    assert search.kept(plan).keys() == {"dance"}  # another command's methods are not forgotten


def test_several_rewards_are_judged_by_their_weighted_sum(tmp_path: Path):
    both = ("rewards=[world, {name: world_strict, weight: 2}]", "evaluation.strict=null")
    plan = small_plan(tmp_path, "flow-grpo", profile="default", budget=400.0, settings=both)
    jobs = search.jobs(plan, cost_of_8)
    leave(jobs[0], lambda picture, step: 0.6)  # world_strict is 1
    assert search.validated(jobs)["flow-grpo"][jobs[0].point].value == pytest.approx(0.6 + 2 * 1.0)


def test_a_damaged_file_is_refused(tmp_path: Path):
    for damaged in ("{", "{}", "[3]", '[{"method": "flow-grpo"}]', '[{"methods": "flow-grpo"}]'):
        (tmp_path / search.FILE).write_text(damaged)
        with pytest.raises(ConfigError, match=r"must hold the winners of the search as JSON.*remove it"):
            search.kept(small_plan(tmp_path, "flow-grpo", profile="default"))


def test_without_a_search_a_methods_own_values_are_used(tmp_path: Path):
    plan = small_plan(tmp_path, "flow-grpo")
    assert search.jobs(plan, cost_of_8) == []
    winners = search.tuned(plan, [])
    assert winners == {"flow-grpo": METHOD.untuned}
    assert search_table(search.write(plan, [], winners)).rows[0][3] == "not searched"


# Of an earlier comparison --------------------------------------------------------------------------------------------


def entry(method: str, knob: str, rate: str = "3e-3", value: str = "1e-3") -> dict[str, Any]:
    """What a comparison that has searched writes of a method."""
    point = {"optimizer.learning_rate": rate, knob: value, "validation_reward": 0.7, "half_interval": 0.1}
    return {"method": method, "label": method, "searched": True, "points": [point], "optimizer.learning_rate": rate} | {
        knob: value
    }


@pytest.mark.parametrize("form", ["tuning.json", "results.json"])
def test_what_an_earlier_comparison_has_found_is_taken_and_not_searched_again(form: str, tmp_path: Path):
    found = [entry("neighbor-dpmpp-8", "algorithm.clip_range")]
    file = tmp_path / form
    file.write_text(json.dumps(found if form == "tuning.json" else {"tuning": found, "tables": []}))
    plan = small_plan(tmp_path / "paper", profile="default", tuned_by=file)
    assert {job.method for job in search.jobs(plan, cost_of_8)} == {"flow-grpo"}
    winners = search.tuned(plan, search.jobs(plan, cost_of_8))
    assert winners == {"neighbor-dpmpp-8": ("3e-3", "1e-3"), "flow-grpo": METHOD.untuned}
    plan.output_dir.mkdir()
    own, other = search.write(plan, search.jobs(plan, cost_of_8), winners)
    assert own == found[0]
    assert not other["searched"]
    rows = [row for row in search_table([own]).rows]
    assert rows == [("neighbor-dpmpp-8", "3e-3", "clip_range 1e-3", "0.700 ± 0.100", "", "yes")]


def test_what_runs_were_begun_with_stays_whatever_a_later_call_names(tmp_path: Path):
    def plan(**asked: object) -> Plan:
        return small_plan(tmp_path / "paper", "flow-grpo", profile="default", **asked)

    for rate in ("3e-3", "1e-4"):
        (tmp_path / f"{rate}.json").write_text(json.dumps([entry("flow-grpo", "algorithm.clip_range", rate)]))
    first = plan(tuned_by=tmp_path / "3e-3.json")
    first.output_dir.mkdir()
    (written,) = search.write(first, [], search.tuned(first, []))
    (first.output_dir / "runs" / "flow-grpo").mkdir(parents=True)
    jobs = search.jobs(later := plan(), cost_of_8)
    assert search.tuned(later, jobs) == {"flow-grpo": ("3e-3", "1e-3")}
    assert search.write(later, jobs, search.tuned(later, jobs)) == [written]
    with pytest.raises(
        ConfigError, match=r"runs of flow-grpo were begun with \(3e-3 and 1e-3\), got 1e-4 and 1e-3; leave"
    ):
        search.tuned(other := plan(tuned_by=tmp_path / "1e-4.json"), search.jobs(other, cost_of_8))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "--tuned-by must be a file"),
        ("{", "--tuned-by must be JSON"),
        ("[]", "no search of any of neighbor-ddim-25, "),
        ('{"tables": []}', "no search of any of"),
        ('[{"method": "gone"}]', "no search of any of"),
        (json.dumps([entry("neighbor-dpmpp-8", "algorithm.clip_range") | {"searched": False}]), "no search of any of"),
        (json.dumps([entry("dance", "algorithm.clip_range")]), "of methods that are compared now, got one of dance"),
        (
            json.dumps([entry("neighbor-dpmpp-8", "algorithm.clip_range", value="7")]),
            "--tuned-by: .*clip_range .*got 7",
        ),
        *(
            (json.dumps([entry("neighbor-dpmpp-8", "algorithm.clip_range"), damaged]), "hold each method's winner and")
            for damaged in (
                3,
                {"method": "nft"},
                {"method": ["nft"]},
                entry("nft", "algorithm.clip_range"),  # its knob is another
                entry("nft", "algorithm.mixture", rate="fast"),
                entry("nft", "algorithm.mixture", rate="inf"),
                entry("nft", "algorithm.mixture") | {"label": None},
                entry("nft", "algorithm.mixture") | {"searched": "yes"},
                entry("nft", "algorithm.mixture") | {"points": [{}]},
                entry("nft", "algorithm.mixture") | {"validation_reward": "high"},
            )
        ),
    ],
)
def test_a_file_that_holds_no_search_is_refused(text: str | None, problem: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "tuning.json").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        small_plan(tmp_path / "paper", tuned_by=tmp_path / "tuning.json")
