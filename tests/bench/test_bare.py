"""The bare calls of an iteration are its own calls, and their times add up."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig

from ngrpo_lora.bench import bare
from ngrpo_lora.bench.held import HeldAlgorithm
from ngrpo_lora.config import RunConfig
from ngrpo_lora.models._blueprint import random_family
from ngrpo_lora.training.metering import STAGES
from ngrpo_lora.training.rollouts import prompts_of
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import iterate

SHAPES = {
    "as configured": [],
    "several groups a pass, several updates": [
        "rollout.prompts_per_iteration=3",
        "rollout.micro_batch_size=8",
        "algorithm.updates_per_rollout=2",
        "trainer.micro_batch_size=3",
    ],
    "a reference, old velocities": ["algorithm.reference_weight=0.1", "algorithm.updates_per_rollout=2"],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_bare_calls_are_those_of_the_iteration(shape: str, make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path / "run", "evaluation.num_prompts=1", *SHAPES[shape]))
    run.algorithm = HeldAlgorithm(run.algorithm)
    calls: Counter[Any] = Counter()
    velocity, decode, encode_alone = run.family.velocity, run.family.decode, run.family.encode_alone

    def counted(name: str, function: Any) -> Any:
        def call(first: Any, *rest: Any) -> Any:
            size = len(first) if isinstance(first, torch.Tensor) else first
            calls[name, size, name == "velocity" and torch.is_grad_enabled()] += 1
            return function(first, *rest)

        return call

    run.family.velocity = counted("velocity", velocity)
    run.family.decode = counted("decode", decode)
    run.family.encode_alone = counted("encode", encode_alone)
    prompts = prompts_of(run)
    iterate(run)
    expected = calls.copy()
    calls.clear()
    bare.bare_iteration(run, prompts, {prompt.condition: prompt for prompt in prompts}.values())
    assert calls == expected
    assert any(with_gradient for _, _, with_gradient in calls)


def test_the_table_is_made_of_what_was_measured(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config: RunConfig = make_config(tmp_path / "run")
    found = bare.measure_bare(config, 2)
    assert not Path(config.output_dir).exists()
    assert [*found.iteration] == [*found.calls] == [*STAGES, "all"]
    assert all(math.isnan(found.iteration[stage].cpu) for stage in STAGES)
    assert min(seconds.wall for parts in found[:2] for seconds in parts.values()) > 0
    lines: list[str] = []
    monkeypatch.setattr(bare, "measure_bare", lambda *_: found)
    bare.bare_table(config, 2, lines.append)
    *stages, wall, cpu = lines[-1].strip("| ").split(" | ")[1:]
    expected = [found.iteration[stage].wall / found.calls[stage].wall for stage in STAGES]
    assert [*map(float, stages)] == pytest.approx(expected, abs=5e-4)
    assert (wall, cpu) == (found.wall_ratio.show(), found.cpu_ratio.show())


def test_the_ratio_is_that_of_an_iteration_and_the_calls_after_it(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The machine is three times as slow in the last pair, which their ratio does not notice."""
    paces = (9.0, 1.0, 3.0)  # the first pair warms up
    ours, calls = iter([2.2 * pace for pace in paces]), iter([2.0 * pace for pace in paces])

    def parts(wall: float, cpu: float) -> dict[str, bare.Seconds]:
        return dict.fromkeys([*STAGES, "all"], bare.Seconds(wall, cpu))

    monkeypatch.setattr(bare, "whole_iteration", lambda _: parts(wall := next(ours), wall + 1))
    monkeypatch.setattr(bare, "bare_iteration", lambda *_: parts(wall := next(calls), wall + 1 / 1.1))
    found = bare.measure_bare(make_config(tmp_path / "run"), 2)
    for ratio in (found.wall_ratio, found.cpu_ratio):
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert found.iteration["all"].wall == pytest.approx(4.4)


def test_conditionings_of_a_cache_are_no_calls(make_config: MakeConfig, tmp_path: Path):
    """A model with random weights has no text encoders, and its run neither loads nor leaves anything."""
    config = make_config(tmp_path / "run", "model.path=embedded", "rewards=jpeg")
    family = random_family(config.model)
    with bare.opened(config, family) as run:
        assert run.family is family
        found = bare.in_turn(run, 1)
        assert run.output_dir.is_dir()
    assert found.calls["all"].wall > 0
    assert not run.output_dir.exists()
