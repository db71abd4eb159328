"""The methods: which there are, and that every row of every table differs by what its table is about."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngrpo_lora import registry
from ngrpo_lora.bench.paper import methods
from ngrpo_lora.bench.paper.methods import ALL, BASELINE, DISTILLED, METHODS, TABLES, find, rows
from ngrpo_lora.bench.paper.plan import main_jobs, make_plan
from ngrpo_lora.bench.paper.published import COLUMNS, FIGURES
from ngrpo_lora.errors import ConfigError


def test_every_algorithm_is_compared():
    assert {method.algorithm for method in METHODS} == {*registry.names(registry.ALGORITHMS)}
    assert find(()) == tuple(method.name for method in ALL)


def test_an_unknown_method_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="--method must be one of .*, got 'flow-grop'; did you mean flow-grpo"):
        find(("flow-grop",))


def test_names_are_unique_and_a_name_means_the_same_settings_in_every_table():
    by_name: dict[str, dict[str, str]] = {}
    for table in TABLES.values():
        assert len({method.name for method in table}) == len(table)
        for method in table:
            assert by_name.setdefault(method.name, method.settings) == method.settings


@pytest.mark.parametrize(
    ("table", "key", "values"),
    [
        (4, "algorithm.perturbation_strength", ["1.0", "0.5", None, "0.1"]),  # 0.3 is the default
        (5, "algorithm.num_anchors", ["1", "2", "4", "8", "12"]),
        (6, "algorithm.advantage_p", [None, "1", "0.8", "0.5"]),  # 2 is the default
    ],
)
def test_an_ablation_varies_one_setting_alone(table: int, key: str, values: list[str | None]):
    assert [method.settings.get(key) for method in TABLES[table]] == values
    radius = "algorithm.perturbation_strength"
    without = [{k: v for k, v in method.settings.items() if k not in (key, radius)} for method in TABLES[table]]
    assert all(settings == without[0] for settings in without)
    if table != 4:
        assert {method.settings[radius] for method in TABLES[table]} == {"0.5"}


def test_variants_take_the_values_found_for_their_method():
    assert {method.tuned_as for method in rows(2, tuple(m.name for m in METHODS))} == {
        "dance",
        "mix",
        "branch",
        BASELINE,
    }
    assert [method.name for method in rows(2, ("dance",))] == ["vivid-dance"]
    assert {method.tuned_as for table in (4, 5, 6, 7) for method in TABLES[table]} == {BASELINE}


def test_every_method_is_searched_as_much():
    assert {len(method.knob_values) for method in ALL} == {2}
    assert all(method.untuned[0] in methods.LEARNING_RATES for method in ALL)
    assert all(method.untuned[1] in method.knob_values for method in ALL)


def test_the_distilled_model_is_trained_and_drawn_at_its_own_steps_and_searched_for_itself(tmp_path: Path):
    plan = make_plan(tmp_path, "quick", tables=(8,))
    assert plan.methods == plan.searched == DISTILLED
    for job in main_jobs(plan, {method.name: method.untuned for method in DISTILLED}, lambda config, budget: (1, 1.0)):
        config = job.config
        assert (config.rollout.num_steps, config.evaluation_steps, config.model.fuse) == (4, 4, {"embedded-turbo": 1.0})
        assert (config.evaluation_solver, config.rollout.solver) == ("euler", "euler")
    assert {method.algorithm for method in DISTILLED} == {"neighbor", "flow_grpo", "dance", "nft"}


def test_the_papers_figures_belong_to_rows_of_its_tables():
    for number, figures in FIGURES.items():
        assert figures.keys() <= {"base", *(method.name for method in TABLES[number])}
        assert all(len(values) == len(COLUMNS[number]) for values in figures.values())
    assert FIGURES[3][BASELINE] == (8, 1.33, 45.08)
