"""From what is asked for to the list of runs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from paper_runs import cost_of_8, jobs_of, small_plan

from ngrpo_lora.bench.paper.cost import length
from ngrpo_lora.bench.paper.plan import (
    PROFILES,
    TRAINED_TASKS,
    evaluated_every,
    main_jobs,
    make_plan,
    points,
    search_job,
)
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.prompts.sources import open_split
from ngrpo_lora.world.scenes import parse


def test_every_run_has_the_budget_and_the_equal_iterations(tmp_path: Path):
    jobs = jobs_of(small_plan(tmp_path, budget=400.0, seeds=2))
    assert [(job.name, job.config.trainer.num_iterations) for job in jobs] == [
        ("runs/neighbor-dpmpp-8/seed-0", 40),
        ("runs/flow-grpo/seed-0", 10),
        ("runs/neighbor-dpmpp-8/seed-1", 40),
        ("runs/flow-grpo/seed-1", 10),
    ]
    assert [job.config.seed for job in jobs] == [0, 0, 1, 1]
    for job in jobs:
        assert job.folder == tmp_path / job.name
        assert 4 % job.config.evaluation.every == 0  # iteration 4 is evaluated, at which all are compared


def test_a_dearer_method_still_goes_as_far_as_the_others(tmp_path: Path):
    plan = small_plan(tmp_path, "flow-grpo", budget=400.0)
    (job,) = main_jobs(plan, {"flow-grpo": ("1e-3", "1e-3")}, lambda config, budget: (1, 390.0))
    assert job.config.trainer.num_iterations == plan.equal_iterations == 4


@pytest.mark.parametrize(("iterations", "equal", "every"), [(24, 24, 4), (184, 24, 24), (40, 24, 8), (3, 1, 1)])
def test_evaluations_are_few_and_one_is_at_the_equal_iterations(iterations: int, equal: int, every: int):
    assert evaluated_every(iterations, equal) == every


def test_the_search_has_every_point_for_as_much_compute_on_other_prompts_and_seeds(tmp_path: Path):
    plan = small_plan(tmp_path, profile="default", budget=1600.0)
    jobs = [search_job(plan, method, point, cost_of_8) for method in plan.searched for point in points(method)]
    for method in plan.searched:
        own = [job for job in jobs if job.method == method.name]
        (iterations,) = {job.config.trainer.num_iterations for job in own}
        assert iterations == {"neighbor-dpmpp-8": 40, "flow-grpo": 16}[method.name]  # 10 would be too few to rank
        settings = {(job.config.optimizer.learning_rate, job.config.algorithm.clip_range) for job in own}  # pyright: ignore
        assert settings == {(float(rate), float(clip)) for rate, clip in points(method)}
    config, table = jobs[0].config, jobs_of(plan)[0].config
    assert config.seed not in range(100)
    assert config.evaluation.seed not in range(table.evaluation.seed, table.evaluation.seed + 10_000)
    held_out = {open_split(table.prompts, 0, table.evaluation.seed)[1].prompt(i).text for i in range(480)}
    validation = {open_split(config.prompts, 0, config.evaluation.seed)[1].prompt(i).text for i in range(240)}
    assert not held_out & validation
    assert {parse(text).task for text in validation} == {*TRAINED_TASKS} < {parse(text).task for text in held_out}


@pytest.mark.parametrize(("name", "iterations"), [("mix", 64), ("mix-flash", 85)])
def test_a_window_stops_in_as_many_places_however_long_a_run_is(tmp_path: Path, name: str, iterations: int):
    for budget in (2400.0, 4800.0):
        (job,) = main_jobs(plan := small_plan(tmp_path, name, budget=budget), {name: ("1e-3", "1e-3")}, length)
        total = job.config.trainer.num_iterations
        assert total == pytest.approx(iterations * budget / 2400, rel=0.03)
        assert total // job.config.algorithm.window_every in (11, 12, 13)  # pyright: ignore
        assert plan.equal_iterations <= total


def test_full_goes_on_from_default(tmp_path: Path):
    default, full = (make_plan(tmp_path, profile) for profile in ("default", "full"))
    rest = {job.name: job.config for job in jobs_of(full)}
    jobs = jobs_of(default)
    assert all(rest[job.name] == job.config for job in jobs)
    assert len(rest) > 3 * len(jobs)
    assert PROFILES["full"].tables == (1, 2, 3, 4, 5, 6, 7, 8)


def test_ablations_have_the_baselines_values_alone(tmp_path: Path):
    plan = make_plan(tmp_path, "quick", tables=(4,))
    assert [method.name for method in plan.searched] == ["neighbor-dpmpp-8"]
    assert [job.config.algorithm.perturbation_strength for job in jobs_of(plan)] == [1.0, 0.5, 0.3, 0.1]  # pyright: ignore


def test_a_setting_is_laid_over_the_common_ones(tmp_path: Path):
    plan = small_plan(tmp_path, settings=("lora.rank=4", "rollout.group_size=6"))
    assert {(job.config.lora.rank, job.config.rollout.group_size) for job in jobs_of(plan)} == {(4, 6)}
    assert [job.config.rollout.num_steps for job in jobs_of(plan)] == [8, 10]


def test_all_methods_evaluate_alike(tmp_path: Path):
    configs = [job.config for job in jobs_of(make_plan(tmp_path, "quick"))]
    for config in configs:
        assert (config.evaluation_solver, config.evaluation_steps) == ("dpmpp_2m", 16)
        assert config.rollout.prompts_per_iteration * config.rollout.group_size == 48
        same = config.evaluation.model_copy(update={"every": 1})
        assert same == configs[0].evaluation.model_copy(update={"every": 1})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tables": (9,)}, "--table must be one of 1, 2, 3, 4, 5, 6, 7, 8, got 9"),
        ({"seeds": 0}, "--seeds must be from 1 to 100, got 0"),
        ({"seeds": 10**9}, "--seeds must be from 1 to 100, got 1000000000"),
        *(({"budget": value}, f"--budget must be above 0 .*, got {value:g}") for value in (-1.0, math.inf, math.nan)),
        ({"budget": 1e12}, r"at most 1,000,000 forward passes per sample, got 1e\+12"),
        ({"settings": ("rollout.num_steps=4",)}, "rollout.num_steps must be left to `ngrpo bench paper`"),
        ({"settings": ("algorithm.eta=0.3",)}, "algorithm.eta must be left to `ngrpo bench paper`"),
        ({"settings": ("optimizer.learning_rate=1",)}, "optimizer.learning_rate must be left to `ngrpo bench paper`"),
        *(
            ({"settings": (text,)}, rf"must look like key=value, got {re.escape(repr(text))}")
            for text in ("lora.rank", "=4", " seed=4", "lora.rank=4\nseed=4")
        ),
        (
            {"settings": ("trainer={num_iterations: 4}",)},
            "trainer must be given key by key, such as trainer.micro_batch",
        ),
        ({"settings": ("lora.rnak=4",)}, "lora.rnak"),
        ({"settings": ("evaluation.num_prompts=5",)}, "num_prompts must be at least 12, two of each task, got 5"),
        ({"tables": (4,), "names": ("flow-grpo",)}, "must have a method in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(asked: dict[str, object], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        make_plan(tmp_path, "quick", **asked)  # pyright: ignore


def test_every_run_is_in_the_folder_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Names that mean something in YAML are names; `$NAME` is what it is in any path of a configuration."""
    monkeypatch.setenv("WHERE", "there")
    for name in ("it's", "a: b # c", "[x", "$WHERE/x"):
        plan = small_plan(tmp_path / name, budget=400.0)
        assert plan.output_dir == tmp_path / name.replace("$WHERE", "there")
        assert {job.folder.parents[2] for job in jobs_of(plan)} == {plan.output_dir}
    with pytest.raises(ConfigError, match=r"--output-dir must not name a variable that is not set, got .*\$WHENCE"):
        small_plan(tmp_path / "$WHENCE")
