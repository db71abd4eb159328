"""What an iteration costs against its quantities: fits on exact data, cases that differ in one thing, real times."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig

from ngrpo_lora import registry
from ngrpo_lora.algorithms._opening import open_algorithm
from ngrpo_lora.bench import scaling
from ngrpo_lora.bench.held import HeldAlgorithm
from ngrpo_lora.bench.scaling import Case, Sweep, fit
from ngrpo_lora.config import RunConfig, changed_keys, load_config
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.types import RewardBatch


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path) -> RunConfig:
    return make_config(tmp_path / "run", "model.height_px=32", "model.width_px=32")


@pytest.fixture
def flow_grpo(config: RunConfig) -> RunConfig:
    return RunConfig.model_validate(config.model_dump(mode="json") | {"algorithm": {"name": "flow_grpo"}})


def test_fits_recover_a_line_and_a_power_law():
    x = [1.0, 2.0, 4.0, 8.0]
    line = fit(x, [0.5 + 0.25 * value for value in x])
    assert (line.intercept_s, line.slope_s) == pytest.approx((0.5, 0.25))
    assert 0 < line.exponent < 1  # a fixed cost
    power = fit(x, [3 * value**1.7 for value in x])
    assert power.exponent == pytest.approx(1.7)
    assert power.error == pytest.approx(0, abs=1e-9)


def test_the_exponents_error_is_that_of_least_squares():
    noise = [0.1, -0.2, 0.15, -0.05]
    x = [math.e**place for place in range(4)]
    found = fit(x, [math.exp(2 * place + noise[place]) for place in range(4)])
    slope = sum((place - 1.5) * (2 * place + noise[place]) for place in range(4)) / 5
    offset = sum(2 * place + noise[place] - slope * place for place in range(4)) / 4
    residual = sum((2 * place + noise[place] - slope * place - offset) ** 2 for place in range(4))
    assert found.exponent == pytest.approx(slope)
    assert found.error == pytest.approx(math.sqrt(residual / 2 / 5))


def test_two_points_have_no_error_and_no_time_has_no_power():
    assert math.isnan(fit([1, 2], [4, 2]).error)
    assert fit([1, 2], [4, 2]).exponent == pytest.approx(-1)
    assert math.isnan(fit([1, 2, 3], [0.0, 1, 2]).exponent)


def all_kept(algorithm: HeldAlgorithm, config: RunConfig, rewards: float = 0.0) -> list[int]:
    shape = (config.rollout.prompts_per_iteration, config.rollout.group_size)
    batch = RewardBatch(torch.full(shape, rewards, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool), {})
    return [len(update) for update in algorithm.updates(algorithm.advantages(batch), 0, 0)]


def test_an_algorithm_is_held_to_its_transitions_whatever_the_rewards_are(config: RunConfig, flow_grpo: RunConfig):
    assert scaling.available(config) == 8  # 2 groups, B = 2, K = 2
    assert scaling.available(flow_grpo) == 24  # 8 samples, all steps but the last
    for one, most in ((config, 8), (flow_grpo, 24)):
        algorithm = open_algorithm(one)
        assert all_kept(HeldAlgorithm(algorithm), one) == [most // 2, most // 2]
        assert all_kept(HeldAlgorithm(algorithm, 5), one, 0.7) == [3, 2]
        assert HeldAlgorithm(algorithm).metric_names == algorithm.metric_names


def test_uneven_updates_are_held_to_the_exact_number(flow_grpo: RunConfig):
    algorithm = flow_grpo.algorithm.model_copy(update={"updates_per_rollout": 3})
    uneven = flow_grpo.model_copy(update={"algorithm": algorithm})
    assert all_kept(HeldAlgorithm(open_algorithm(uneven), 22), uneven) != [8, 7, 7]
    assert sum(all_kept(HeldAlgorithm(open_algorithm(uneven), 22), uneven)) == 22


def test_cases_differ_in_their_quantity_alone(config: RunConfig):
    cases = scaling.plan(config)
    assert {quantity: [case.x for case in found] for quantity, found in cases.items()} == {
        "group size": [2, 4, 6, 8],
        "solver steps": [2, 4, 6, 8],
        "pixels": [16**2, 32**2, 48**2, 64**2],
        "transitions": [2, 4, 6, 8],
    }
    keys = {"group size": "rollout.group_size", "solver steps": "rollout.num_steps", "pixels": "model."}
    for quantity, key in keys.items():
        assert {case.transitions for case in cases[quantity]} == {8}
        for case in cases[quantity]:
            assert all(change.startswith(key) for change in changed_keys(config, case.config))
    assert [case.transitions for case in cases["transitions"]] == [2, 4, 6, 8]
    assert all(case.config == config for case in cases["transitions"])


def test_transitions_are_held_where_they_grow_with_the_quantity(flow_grpo: RunConfig):
    cases = scaling.plan(flow_grpo)
    assert {case.transitions for case in cases["group size"]} == {2 * 2 * 3}
    assert {case.transitions for case in cases["solver steps"]} == {8 * 1}


@pytest.mark.parametrize("algorithm", registry.names(registry.ALGORITHMS))
def test_every_algorithm_has_values_of_every_quantity(algorithm: str):
    config = load_config("demo", [f"algorithm={algorithm}", "rollout.num_steps=12", "rollout.group_size=8"])
    for quantity, found in scaling.plan(config).items():
        assert len({case.x for case in found}) >= 3
        for case in found:
            assert 0 < case.transitions <= scaling.available(case.config)
            assert case.transitions == (case.x if quantity == "transitions" else found[0].transitions)


def test_values_that_a_configuration_refuses_are_not_tried(make_config: MakeConfig, tmp_path: Path):
    anchors = make_config(tmp_path / "run", "algorithm.num_anchors=4", "model.width_px=64", "model.height_px=128")
    cases = scaling.plan(anchors)
    assert [case.x for case in cases["group size"]] == [4, 6, 8, 12]
    sizes = [(case.config.model.width_px, case.config.model.height_px) for case in cases["pixels"]]
    assert sizes == [(32, 64), (64, 128), (96, 192), (128, 256)]
    few = ["rollout.prompts_per_iteration=1", "algorithm.num_anchors=1", "algorithm.num_train_steps=2"]
    with pytest.raises(ConfigError, match="at least 3 transitions, or no fewer can be trained, got 2"):
        scaling.plan(make_config(tmp_path / "few", *few))
    whole = make_config(tmp_path / "whole", "rollout.num_steps=1000", "algorithm.num_train_steps=600")
    with pytest.raises(ConfigError, match="finds no values to vary: rollout.num_steps must be at most 1000"):
        scaling.plan(whole)


def test_sweeps_are_medians_without_the_first_turn(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    """Made-up times: rollouts take G seconds, but three times that in the turn that warms up and in the last one."""
    turns: dict[int, int] = {}

    def made_up(run: scaling.Run) -> dict[str, float]:
        group = run.config.rollout.group_size
        turns[group] = turns.get(group, -1) + 1
        slow = 3 if turns[group] in (0, 3) else 1
        assert isinstance(run.algorithm, HeldAlgorithm)
        assert run.algorithm.transitions == 8
        return {"time/rollout_s": slow * float(group), "time/reward_s": 1.0, "time/update_s": 2.0}

    monkeypatch.setattr(scaling, "iterate", made_up)
    cases = {"group size": scaling.plan(config)["group size"]}
    (sweep,) = scaling.measure(config, cases, 3)
    assert sweep.x == [2, 4, 6, 8]
    assert sweep.seconds["rollout"] == [2.0, 4.0, 6.0, 8.0]
    assert sweep.seconds["iteration"] == [5.0, 7.0, 9.0, 11.0]
    assert sweep.fits()["rollout"].exponent == pytest.approx(1)
    assert sweep.fits()["update"].slope_s == pytest.approx(0)


@pytest.mark.parametrize("algorithm", ["neighbor", "flow_grpo"])
def test_real_iterations_are_timed_at_every_value(algorithm: str, config: RunConfig, flow_grpo: RunConfig):
    one = config if algorithm == "neighbor" else flow_grpo
    cases = scaling.plan(one)
    ends = {quantity: [found[0], found[-1]] for quantity, found in cases.items()}
    done: list[None] = []
    sweeps = scaling.measure(one, ends, 1, lambda: done.append(None))
    assert len(done) == 2 * 8
    assert [sweep.quantity for sweep in sweeps] == [*cases]
    for sweep in sweeps:
        assert set(sweep.seconds) == {"rollout", "reward", "update", "iteration"}
        assert all(seconds > 0 for seconds in sweep.seconds["rollout"] + sweep.seconds["update"])
    assert not Path(one.output_dir).exists()


def test_a_case_draws_and_trains_what_it_says(config: RunConfig, tmp_path: Path):
    run = scaling.prepare(config)
    pixels = scaling.plan(config)["pixels"][-1]
    steps = scaling.plan(config)["solver steps"][-1]
    for case, samples in ((pixels, 8 * 4), (steps, 8 * 8), (Case(3, config, 3), 8 * 4)):
        variant = scaling.variant(run, case)
        variant.counter.reset()
        metrics = scaling.iterate(variant)
        assert metrics["nfe/theta_per_sample"] == case.transitions / 8
        assert metrics["nfe/old_per_sample"] >= samples / 8
        assert variant.family.latent_shape[-1] * 32 == run.family.latent_shape[-1] * case.config.model.width_px
        assert variant.family.transformer is run.family.transformer


@pytest.mark.slow
def test_processes_are_whole_runs(config: RunConfig):
    done: list[None] = []
    sweep = scaling.measure_processes(config, [1, 2], 1, lambda: done.append(None))
    assert (sweep.quantity, sweep.x, len(done)) == ("processes", [1, 2], 2)
    assert all(seconds > 0 for seconds in sweep.seconds["iteration"])


def test_a_run_that_fails_says_why(config: RunConfig):
    gone = config.rewards.model_copy(update={"train": (config.rewards.train[0].model_copy(update={"name": "gone"}),)})
    with pytest.raises(UserError, match="a run of 2 processes failed: ngrpo: .*gone"):
        scaling.measure_processes(config.model_copy(update={"rewards": gone}), [2], 1, lambda: None)


@pytest.mark.parametrize("counts", [[1], [2, 2], [0, 1], [1, 3]])
def test_processes_that_no_run_can_have_are_refused(counts: list[int], config: RunConfig):
    with pytest.raises(ConfigError, match=r"two or more different numbers from 1 to .* \(2\), got"):
        scaling.check_processes(config, counts)


def test_the_table_and_the_file_have_times_fits_and_expectations(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seconds = {"rollout": [1.0, 2.0, 4.0], "reward": [0.0, 0.0, 0.1], "update": [3.0, 3.0, 3.0]}
    found = Sweep("solver steps", [4, 8, 16], seconds)
    processes = replace(found, quantity="processes", x=[1, 2], seconds={"update": [4.0, 2.0]})
    monkeypatch.setattr(scaling, "measure", lambda *_: [found])
    monkeypatch.setattr(scaling, "measure_processes", lambda *_: processes)
    output, lines = tmp_path / "new" / "scaling.json", []
    scaling.scaling_table(config, [1, 2], 3, output, lines.append)
    table = lines[-1].splitlines()
    assert table[2] == "| solver steps | rollout | 4: 1.000, 8: 2.000, 16: 4.000 | 0.000 +0.25 x | 1.00 ± 0.00 | 1 |"
    assert table[3].endswith("| -0.050 +0.00893 x |  |  |")
    assert table[4].endswith("| 3.000 +0 x | 0.00 | 0 |")
    assert table[5] == "| processes | update | 1: 4.000, 2: 2.000 | 6.000 -2 x | -1.00 | -1 |"
    kept = json.loads(output.read_text())
    assert [sweep["quantity"] for sweep in kept["sweeps"]] == ["solver steps", "processes"]
    assert kept["sweeps"][0]["fits"]["rollout"]["exponent"] == pytest.approx(1)
    assert kept["sweeps"][0]["fits"]["reward"]["exponent"] is None
    assert kept["repeats"] == 3


def test_a_file_that_cannot_be_written_is_known_at_once(config: RunConfig, tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="--output must be a writable file"):
        scaling.scaling_table(config, [], 1, tmp_path / "file" / "x.json", lambda _: None)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("text", ["notes of mine", "[1]", '{"bench": "gradient"}'])
def test_a_file_of_another_purpose_is_never_written_over(text: str, tmp_path: Path):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--output must be a new file or one of `ngrpo bench scaling`, but .*neither"):
        scaling.check_writable(path)
    assert path.read_text() == text
    path.write_text('{"bench": "scaling"}')
    scaling.check_writable(path)


@pytest.mark.parametrize(
    ("error", "message"), [(KeyboardInterrupt(), "whole runs are not timed"), (UserError("x"), "x")]
)
def test_what_is_measured_is_told_and_kept_where_whole_runs_end_early(
    error: BaseException, message: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def ends(*_: object) -> Sweep:
        raise error

    monkeypatch.setattr(scaling, "measure", lambda *_: [Sweep("solver steps", [4, 8], {"update": [1.0, 2.0]})])
    monkeypatch.setattr(scaling, "measure_processes", ends)
    lines: list[str] = []
    with pytest.raises(UserError, match=message):
        scaling.scaling_table(config, [1, 2], 1, tmp_path / "scaling.json", lines.append)
    assert "| solver steps | update | 4: 1.000, 8: 2.000 |" in lines[-1]
    assert [sweep["x"] for sweep in json.loads((tmp_path / "scaling.json").read_text())["sweeps"]] == [[4, 8]]


def test_ctrl_c_says_that_nothing_is_kept(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "measure", interrupted)
    with pytest.raises(UserError, match="stopped; as all values take turns, there is nothing to keep"):
        scaling.scaling_table(config, [], 1, None, print)
