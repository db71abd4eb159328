"""What an update's direction is worth: the estimators on gradients whose share is known, and real iterations."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeConfig
from torch import Tensor

from ngrpo_lora.bench import gradient
from ngrpo_lora.bench.gradient import Asked, Point, chosen, common_share, halves, point, products
from ngrpo_lora.bench.varying import Setting
from ngrpo_lora.config import RunConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation.statistics import Estimate
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import iterate
from ngrpo_lora.world.scenes import SHAPES

SMALL = Asked(gradients=3, prompts=8, steps=(1.0,))


def draws(share: float, count: int, elements: int, rng: np.random.Generator) -> np.ndarray:
    """Gradients (N, elements) of expected squared norm 1, of which `share` is common."""
    common = np.full(elements, math.sqrt(share / elements))
    return common + rng.standard_normal((count, elements)) * math.sqrt((1 - share) / elements)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_common_share_is_unbiased_and_its_interval_holds_it(share: float):
    rng = np.random.default_rng(0)
    gradients = [draws(share, 6, 400, rng) for _ in range(200)]
    found = [common_share(g @ g.T) for g in gradients]
    mean, deviation = (f([estimate.value for estimate in found]) for f in (statistics.mean, statistics.stdev))
    assert abs(mean - share) < 3 * deviation / math.sqrt(200)
    assert sum(estimate.low <= share <= estimate.high for estimate in found) >= 180
    assert deviation < 0.05


def test_identical_gradients_have_everything_in_common_and_orthogonal_ones_nothing():
    assert common_share(np.ones((4, 4))) == Estimate(1.0, 1.0, 1.0)
    assert common_share(np.eye(4)) == Estimate(0.0, 0.0, 0.0)
    assert common_share(np.array([[1.0, -1.0], [-1.0, 1.0]])).value == -1
    assert math.isnan(common_share(np.eye(2)).low)


def test_products_are_all_inner_products_whatever_the_pieces():
    gradients = torch.randn(3, (1 << 20) + 5)
    torch.testing.assert_close(torch.tensor(products(gradients)), gradients.double() @ gradients.double().T)


@pytest.mark.parametrize("wordings", [["{}"], ["{}", "a photo of {}", "a drawing of {}"]])
def test_halves_divide_what_prompts_mean_and_keep_what_means_the_same_together(wordings: list[str]):
    meant = [f"a green {shape}" for shape in SHAPES] + [f"prompt {i}" for i in range(9)]
    prompts = [
        wordings[i // 9 % len(wordings)].format(meant[i % 9]) if i % 9 < len(SHAPES) else meant[i % 9]
        for i in range(25)
    ]
    choosing, reporting = halves(prompts)
    assert sorted([*choosing, *reporting]) == [*range(25)]
    texts = [{meant[place % 9] for place in half} for half in (choosing, reporting)]
    assert [len(half) for half in texts] == [4, 5]
    assert not texts[0] & texts[1]


def test_a_point_tells_the_halves_apart():
    prompts = [f"prompt {i}" for i in range(8)]
    choosing, reporting = halves(prompts)
    before, after = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    after[choosing] = 1.0
    after[reporting] = torch.tensor([0.1, 0.2, 0.3, math.nan], dtype=torch.float64)
    found = point(2.0, before, after, prompts)
    assert (found.step, found.choosing) == (2.0, 1.0)
    assert found.gain.value == pytest.approx(0.2)
    assert found.gain.low < 0.2 < found.gain.high


def test_the_step_is_chosen_by_one_half_alone():
    flattering = Point(1.0, 0.1, Estimate(0.9, 0.8, 1.0))
    better = Point(3.0, 0.2, Estimate(-0.5, -0.6, -0.4))
    assert chosen([flattering, better]) is better


def test_choosing_among_noise_does_not_flatter():
    rng, prompts = torch.Generator().manual_seed(0), [f"prompt {i}" for i in range(16)]
    before = torch.zeros(16)
    chances = [
        chosen([point(step, before, torch.randn(16, generator=rng), prompts) for step in (1.0, 2.0, 3.0, 4.0)])
        for _ in range(300)
    ]
    error = 1 / math.sqrt(8 * 300)
    assert abs(statistics.mean(chance.gain.value for chance in chances)) < 3 * error
    assert statistics.mean(chance.choosing for chance in chances) > 10 * error


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path) -> RunConfig:
    return make_config(tmp_path / "run", "algorithm.updates_per_rollout=1", "optimizer.max_grad_norm=1e9")


def weights(run: Run) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in run.lora_step.parameters.values()]


def test_gradients_are_the_trainers_own_and_nothing_moves(config: RunConfig):
    trained = prepare(config)
    norm = iterate(trained)["lora/grad_norm"]
    run = prepare(config.model_copy(update={"output_dir": f"{config.output_dir}2"}))
    before = weights(run)
    counted: list[None] = []
    gradients, cpu_s, wall_s = gradient.collect_gradients(run, 2, lambda: counted.append(None))
    assert gradients[0].norm().item() == pytest.approx(norm, rel=1e-5)
    assert not torch.allclose(gradients[0], gradients[1])  # of other prompts and noises
    assert all(torch.equal(*pair) for pair in zip(before, weights(run), strict=True))
    assert not all(torch.equal(*pair) for pair in zip(before, weights(trained), strict=True))
    named = zip(run.lora_step.parameters, gradients[0].split([weight.numel() for weight in before]), strict=True)
    assert all(part.any() == ("lora_B" in name) for name, part in named)  # a new adapter's lora_B is 0
    assert len(counted) == len(cpu_s) == len(wall_s) == 2
    assert min(cpu_s) > 0


def test_only_the_first_update_of_an_iteration_counts(make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path / "run", "algorithm.updates_per_rollout=2"))
    gradients, *_ = gradient.collect_gradients(run, 2, lambda: None)
    assert isinstance(run.lora_step, gradient.GradientStep)
    first, second = (g for g in run.lora_step.gradients if g is not None)
    assert torch.equal(gradients[1], first)
    assert not torch.equal(first, second)


def test_a_gradient_that_is_not_finite_is_passed_over(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    run = prepare(config)
    step = gradient.GradientStep(run)
    first = next(iter(step.parameters.values()))
    first.grad = torch.full_like(first, math.inf)
    assert math.isnan(step.take(finite=True, empty=False))
    assert step.gradients == [None]
    assert first.grad is None

    def never(run: Any) -> None:
        run.iteration, run.lora_step.gradients = run.iteration + 1, [None]

    monkeypatch.setattr(gradient, "iterate", never)
    with pytest.raises(UserError, match="only 0 of 12 iterations had a finite gradient"):
        gradient.collect_gradients(run, 2, lambda: None)


def test_a_reward_that_tells_nothing_apart_gives_no_figures(make_config: MakeConfig, tmp_path: Path):
    (tmp_path / "same.py").write_text("def score(images, prompts, metadata):\n    return [0.5] * len(images)\n")
    config = make_config(tmp_path / "run", f"rewards={tmp_path / 'same.py'}:score")
    with pytest.raises(UserError, match="none of 3 iterations had a gradient"):
        gradient.measure(config, SMALL)


@pytest.mark.parametrize("algorithm", ["neighbor", "flow_grpo"])
def test_a_real_run_has_all_figures(algorithm: str, config: RunConfig, tmp_path: Path):
    data = config.model_dump(mode="json")
    if algorithm != "neighbor":
        data["algorithm"] = {"name": algorithm}
    asked = Asked(gradients=6, prompts=16, steps=(1.0,)) if algorithm == "neighbor" else SMALL
    done: list[float] = []
    small = RunConfig.model_validate(data)
    row = gradient.measure(small, asked, done.append)
    assert sum(done) == gradient.work(small, asked)
    assert row["common_share"]["low"] < row["common_share"]["value"] < row["common_share"]["high"]
    assert row["step"] == 1.0
    assert row["improvement"] == row["points"][0]["gain"]
    assert min(row["seconds"], row["wall_s"], row["norm"]) > 0
    assert not Path(small.output_dir).exists()
    assert gradient.as_table([{"label": "as configured", **row}], asked).count("\n| as configured | ") == 1
    if algorithm == "neighbor":
        assert row["improvement"]["low"] > 0  # redness rises against the gradient of its loss


@pytest.fixture
def settings(config: RunConfig) -> list[Setting]:
    return [
        Setting({"seed": seed}, config.model_copy(update={"seed": seed, "output_dir": f"{config.output_dir}{seed}"}))
        for seed in (1, 2, 3)
    ]


def measured(value: float) -> dict[str, Any]:
    share, gain = {"value": value, "low": math.nan, "high": math.nan}, {"value": 0.1, "low": 0.05, "high": 0.15}
    return {"common_share": share, "improvement": gain, "step": 3.0, "seconds": 2.0, "wall_s": 2.5}


def test_a_broken_bench_goes_on_where_it_stopped(
    settings: list[Setting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []

    def until_the_second(config: RunConfig, *_: Any) -> dict[str, Any]:
        if config.seed == 2:
            raise KeyboardInterrupt
        return measured(config.seed / 10)

    def others(config: RunConfig, *_: Any) -> dict[str, Any]:
        seen.append(config.seed)
        return measured(config.seed / 10)

    output, lines = tmp_path / "rows.json", []
    monkeypatch.setattr(gradient, "measure", until_the_second)
    with pytest.raises(UserError, match="stopped after 1 of 3 rows; .* the same command goes on"):
        gradient.gradient_table(settings, SMALL, output, lines.append)
    assert "| seed=1 | 0.100 | +0.100 [+0.050, +0.150] | 3 | 2.00 | 0.05 | 0.05 [0.025, 0.075] |" in lines[0]
    assert "seed=2" not in lines[0]
    assert [row["label"] for row in json.loads(output.read_text())["rows"]] == ["seed=1"]
    monkeypatch.setattr(gradient, "measure", others)
    gradient.gradient_table(settings, SMALL, output, lines.append)
    assert seen == [2, 3]
    assert [line.split(" | ")[:2] for line in lines[1].splitlines()[-3:]] == [
        ["| seed=1", "0.100"],
        ["| seed=2", "0.200"],
        ["| seed=3", "0.300"],
    ]
    with pytest.raises(ConfigError, match=r"gradients: 3 -> 4"):
        gradient.gradient_table(settings, Asked(4, 8, (1.0,)), output, lines.append)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(gradients=1), "--gradients must be at least 2, .* got 1"),
        (Asked(prompts=3), "--prompts must be at least 4, .* got 3"),
        (Asked(steps=(1.0, 0.0)), "--step must be a positive number of AdamW steps, got 0"),
        (Asked(steps=(math.inf,)), "got inf"),
    ],
)
def test_what_gives_no_figures_is_refused(asked: Asked, message: str, settings: list[Setting]):
    with pytest.raises(ConfigError, match=message):
        gradient.check(settings, asked)


def test_held_out_prompts_must_differ_and_a_bench_does_not_resume(config: RunConfig, tmp_path: Path):
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\n")
    prompts = config.prompts.model_copy(update={"held_out": str(tmp_path / "few.txt")})
    with pytest.raises(ConfigError, match="at least 4 different prompts, two for each half, got 3"):
        gradient.check([Setting({}, config.model_copy(update={"prompts": prompts}))], Asked())
    with pytest.raises(ConfigError, match="resume must be null for a bench, got 'latest'; lora.init_from"):
        gradient.check([Setting({}, config.model_copy(update={"resume": "latest"}))], Asked())
