"""`ngrpo bench`: every variant is a real trainer, and a model of random weights costs what the real one does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from torch import nn

from ngrpo_lora.bench import pipeline as bench_pipeline
from ngrpo_lora.bench import solver, training
from ngrpo_lora.config import RunConfig
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models import _blueprint, _quantization


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path) -> RunConfig:
    return make_config(tmp_path / "run")


def test_each_variant_differs_in_one_setting_and_the_first_is_measured_twice(config: RunConfig):
    from ngrpo_lora.config import changed_keys

    first, *others, last = training.variants(config)
    assert first[1] == last[1] == config
    for name, variant in others:
        (change,) = changed_keys(config, variant)
        key, value = name.split("=")
        assert change.startswith(f"{key}: ")
        assert change.lower().endswith(f"-> {value}")
    assert [name for name, _ in others][:2] == ["rollout.merge_adapter=true", "rollout.micro_batch_size=8"]


def test_a_variant_is_timed_stage_by_stage_and_leaves_nothing(config: RunConfig):
    timing = training.measure("as configured", config, 1)
    assert set(timing.seconds) == {"rollout", "reward", "update", "forwards"}
    assert 0 < timing.seconds["forwards"] < timing.seconds["rollout"]
    assert timing.total_s == pytest.approx(sum(timing.seconds[stage] for stage in training.STAGES))
    assert not Path(config.output_dir).exists()


def test_a_variant_that_cannot_run_is_a_line_of_the_table(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    def measure(name: str, variant: RunConfig, iterations: int) -> training.Timing:
        if variant.model.compile:
            raise torch.OutOfMemoryError("CUDA out of memory\nmuch more text")
        return training.Timing(name, {"rollout": 2.0, "reward": 0.5, "update": 1.5, "forwards": 1.0}, 3.25)

    monkeypatch.setattr(training, "measure", measure)
    lines: list[str] = []
    training.overhead_table(config, 1, lines.append)
    assert "| as configured | 2.000 s | 50% | 0.500 s | 1.500 s | 4.000 s | 1.00 | 3.25 |" in lines
    assert "| model.compile=true | not possible here: CUDA out of memory | | | | | | |" in lines


def test_random_weights_cost_time_at_every_size_and_batch(config: RunConfig):
    lines: list[str] = []
    training.gpu_table(config, [32, 64], [1, 2], 1, lines.append)
    assert lines[0].startswith("embedded, random weights, float32, quantization none")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert [row[:2] for row in cells] == [["32 px", "1"], ["32 px", "2"], ["64 px", "1"], ["64 px", "2"]]
    assert all(float(cell.removesuffix(" s")) > 0 for row in cells for cell in row[2:6])


def test_the_random_model_has_the_shapes_of_the_real_one(config: RunConfig):
    from ngrpo_lora.models._loading import load_family

    real, blank = load_family(config.model), _blueprint.random_family(config, config.model)
    shapes = {name: weight.shape for name, weight in real.transformer.named_parameters()}
    assert {name: weight.shape for name, weight in blank.transformer.named_parameters()} == shapes
    assert blank.latent_shape == real.latent_shape


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.15), ("int8", 0.02)])
def test_layers_within_blocks_are_quantised_as_diffusers_does(kind: str, error: float):
    from bitsandbytes import nn as bnb

    block = nn.Sequential(nn.Linear(64, 128), nn.ModuleList([nn.Linear(128, 64, bias=False)])[0])
    inputs = torch.randn(5, 64)
    before = block(inputs)
    _quantization.quantize_linears(block, kind, torch.device("cpu"))
    layer = bnb.Linear4bit if kind == "nf4" else bnb.Linear8bitLt
    assert all(isinstance(child, layer) for child in block)
    difference = (block(inputs) - before).norm() / before.norm()
    assert 0 < difference < error


# The solver, on a flow whose answer is known


def test_the_known_answer_solves_the_ode():
    """Its points keep their place in the distribution, move with the velocity, and begin standard normal."""
    noise = solver.NOISE
    torch.testing.assert_close(solver.cumulative(noise, 1.0), torch.special.ndtr(noise))
    for sigma in (0.9, 0.5, 0.1):
        at = solver.solve(noise, 1.0, sigma)
        later, earlier = (solver.solve(noise, 1.0, sigma + h) for h in (1e-5, -1e-5))
        torch.testing.assert_close((later - earlier) / 2e-5, solver.velocity(at, sigma), rtol=1e-6, atol=1e-8)


def slopes(counts: list[int], errors: list[float]) -> list[float]:
    return [math.log(a / b, n / m) for m, n, a, b in zip(counts, counts[1:], errors, errors[1:], strict=False)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_is_of_second_order_inside_and_up_to_a_logarithm_from_noise_to_data(shift: float):
    counts = [64, 128, 256, 512, 1024]
    errors = [solver.measure(count, shift) for count in counts]
    assert all(1.9 <= slope <= 2.2 for slope in slopes(counts, [e.inside for e in errors]))
    assert all(0.97 <= slope <= 1.03 for slope in slopes(counts, [e.euler for e in errors]))
    # log(K) / K^2: what is left without the logarithm nears slope 2; with it 1.9 needs ten thousands of steps
    whole = slopes(counts, [e.whole / math.log(e.num_steps) for e in errors])
    assert whole == sorted(whole)
    assert 1.85 < whole[-1] < 2.05
    assert 1.7 < slopes(counts, [e.whole for e in errors])[-1] < 1.9


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_few_steps_beat_eulers_and_integer_timesteps_stop_to_converge(shift: float):
    for count in (4, 8, 16):
        errors = solver.measure(count, shift)
        assert errors.whole < errors.euler
        assert errors.exact == pytest.approx(errors.whole, rel=0.25)  # by their own levels, from 0.999
    errors = solver.measure(1024, shift)
    assert errors.exact < 1e-4 < 1e-3 < errors.integer


def test_the_table_has_a_slope_for_every_step_but_the_first():
    lines: list[str] = []
    solver.solver_table([8, 4], [3.0], lines.append)
    four, eight = (solver.measure(count, 3.0) for count in (4, 8))
    assert lines[-2].startswith(f"| 4 | {four.inside:.2e} | {four.whole:.2e} | ")
    slope = math.log2(four.whole / eight.whole)
    assert f"| {eight.whole:.2e} ({slope:.2f}) |" in lines[-1]


# Pipelines, and what their networks take


@torch.no_grad()
def test_the_networks_calls_alone_lead_to_the_pipelines_picture():
    ours, stock = bench_pipeline.open_pipelines(1)
    assert type(ours).__name__ == "NeighborGRPOFluxPipeline"
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 64}
    pictures = []
    for pipeline, seed in ((ours, {"seeds": 0}), (stock, {"generator": torch.Generator().manual_seed(0)})):
        with bench_pipeline.recorded(pipeline) as calls:
            pictures.append(pipeline(bench_pipeline.PROMPT, output_type="pt", **settings, **seed).images)
        assert [name for name, _ in calls] == ["text_encoder", "text_encoder_2", *["transformer"] * 3, "vae"]
        assert torch.equal((calls[-1][1]()[0] / 2 + 0.5).clamp(0, 1), pictures[-1])
        count = len(calls)
        pipeline(bench_pipeline.PROMPT, **settings)
        assert len(calls) == count
    assert torch.equal(*pictures)


def test_a_transformer_may_be_made_wider():
    ours, stock = bench_pipeline.open_pipelines(2)
    assert ours.transformer is stock.transformer
    assert ours.transformer.config.num_attention_heads == 4


def test_the_table_has_the_shortest_of_every_way(monkeypatch: pytest.MonkeyPatch):
    """Seconds are given: of each way the second call is the shortest, and the first, which warms up, does not count."""
    seconds = iter([0.01] * 4 + [0.5, 0.9, 1.2, 1.6] + [0.4, 0.8, 1.0, 1.2])

    def timed(draw: Callable[[], object]) -> float:
        draw()
        return next(seconds)

    monkeypatch.setattr(bench_pipeline, "timed", timed)
    lines: list[str] = []
    bench_pipeline.overhead_table([1], [32], [2], 2, lines.append)
    assert lines[-1] == "| 5 M | 32 px | 2 | 200.0 ms | 800.0 ms | 200.0 ms (+25.0%) | 400.0 ms (+50.0%) |"


def test_settings_that_do_not_go_together_are_no_variants(config: RunConfig):
    data = config.model_dump(mode="json")
    data["model"]["swap_blocks"], data["trainer"]["gradient_checkpointing"] = 2, True
    swapped = RunConfig.model_validate(data)
    names = [name for name, _ in training.variants(swapped)]
    assert "rollout.merge_adapter=true" not in names
    assert "trainer.gradient_checkpointing=false" not in names
    with pytest.raises((ConfigError, ValueError)):
        RunConfig.model_validate(data | {"rollout": data["rollout"] | {"merge_adapter": True}})


def test_a_gpu_that_is_too_small_is_told_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The card is made up; the plan is real."""
    import torch

    from ngrpo_lora.cli import train
    from ngrpo_lora.config import load_config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = load_config("demo", ["model.dtype=float32"])
    for free_gib, told in ((64, False), (0.8, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index, free=free_gib: (int(free * 2**30), 2**33))
        train._warn_of_shortage(config, 1)
        assert ("GiB are free; try " in capsys.readouterr().err) is told
