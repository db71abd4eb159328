"""Every variant is a real trainer, and random weights have a cost at every size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeConfig

from ngrpo_lora.bench import training
from ngrpo_lora.config import RunConfig
from ngrpo_lora.errors import ConfigError, OutOfMemory


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


def test_settings_that_do_not_go_together_are_no_variants(config: RunConfig):
    data = config.model_dump(mode="json")
    data["model"]["swap_blocks"], data["trainer"]["gradient_checkpointing"] = 2, True
    swapped = RunConfig.model_validate(data)
    names = [name for name, _ in training.variants(swapped)]
    assert "rollout.merge_adapter=true" not in names
    assert "trainer.gradient_checkpointing=false" not in names
    with pytest.raises((ConfigError, ValueError)):
        RunConfig.model_validate(data | {"rollout": data["rollout"] | {"merge_adapter": True}})


def test_a_variant_is_timed_stage_by_stage_and_leaves_nothing(config: RunConfig):
    timing = training.measure("as configured", config, 1)
    assert set(timing.seconds) == {"rollout", "reward", "update", "forwards"}
    assert 0 < timing.seconds["forwards"] < timing.seconds["rollout"]
    assert timing.total_s == pytest.approx(sum(timing.seconds[stage] for stage in training.STAGES))
    assert not Path(config.output_dir).exists()


def test_a_variant_whose_micro_batch_is_too_large_is_not_timed_with_a_smaller_one(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    from ngrpo_lora.models._base import BaseFamily

    def lacking(*args: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BaseFamily, "velocity", lacking)
    size = config.rollout.micro_batch_size or config.rollout.group_size
    with pytest.raises(OutOfMemory, match=f"rollout.micro_batch_size must fit into memory, but {size} does not"):
        training.measure("as configured", config, 1)


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
