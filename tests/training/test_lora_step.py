"""One step of the adapter: its average, its clipped gradient, its scale in float16, and steps that are skipped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FinishedRun, MakeConfig
from runs import ONE_UPDATE, assert_same_state, one_update, poison, read_rows, same, weights, without_times

from ngrpo_lora.config import OptimizerConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.records import checkpoints
from ngrpo_lora.training.lora_step import LoraStep
from ngrpo_lora.training.processes import Processes
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.state import state
from ngrpo_lora.training.trainer import complete, iterate


def test_the_average_follows_the_steps_by_its_closed_form(finished_run: FinishedRun):
    """decay^n of the start, and (1 - decay) * decay^(n - k) of step k."""
    run, steps = finished_run.run, finished_run.after_each_step
    assert len(steps) == 4 * 2
    decay = run.config.optimizer.ema_decay
    for name, averaged in run.lora_step.averaged.items():
        expected = finished_run.before["transformer"][name] * decay ** len(steps)
        for k, step in enumerate(reversed(steps)):
            expected = expected + (1 - decay) * decay**k * step[name]
        torch.testing.assert_close(averaged, expected)


def test_the_average_keeps_its_decay_and_takes_the_rest_every_few_updates():
    """Live weights are set by hand: 1, 2, 3, 4 after four updates; only the second and the fourth count."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    config = OptimizerConfig(ema_decay=0.9, ema_every=2)
    step = LoraStep(config, {"weight": parameter}, Processes(), torch.float32, torch.device("cpu"))
    seen = []
    for live in (1.0, 2.0, 3.0, 4.0):
        parameter.data.fill_(live)
        step.take(finite=True, empty=True)  # nothing but the average moves
        seen.append(step.averaged["weight"][0].item())
    assert seen == pytest.approx([0.0, 0.1 * 2, 0.1 * 2, 0.9 * 0.2 + 0.1 * 4])
    other = LoraStep(
        config, {"weight": torch.nn.Parameter(torch.zeros(3))}, Processes(), torch.float32, parameter.device
    )
    other.restore(step.state())
    for one in (step, other):  # an odd number of updates is remembered as well
        one.parameters["weight"].data.fill_(5.0)
        one.take(finite=True, empty=True)
        assert one.averaged["weight"][0].item() == pytest.approx(0.58)


def test_a_state_without_a_count_of_updates_is_one_of_version_0_1():
    parameter = torch.nn.Parameter(torch.zeros(3))
    step = LoraStep(OptimizerConfig(), {"weight": parameter}, Processes(), torch.float32, torch.device("cpu"))
    old = {key: value for key, value in step.state().items() if key != "taken"}
    step.restore(old)
    assert step.taken == 0


def test_gradients_are_clipped_and_their_norm_before_it_reported(
    plain_update: Any, make_config: MakeConfig, tmp_path: Path
):
    limit = plain_update[1]["lora/grad_norm"] / 10
    config = make_config(tmp_path, *ONE_UPDATE, "trainer.micro_batch_size=8", f"optimizer.max_grad_norm={limit}")
    gradients, row, _ = one_update(config)
    norm, plain_norm = (
        torch.stack([gradient.norm() for gradient in found.values()]).norm().item()
        for found in (gradients, plain_update[0])
    )
    assert norm == pytest.approx(limit, rel=1e-3)
    assert row["lora/grad_norm"] == plain_update[1]["lora/grad_norm"] == pytest.approx(plain_norm, rel=1e-5)


def test_in_float16_no_gradient_is_too_small(make_config: MakeConfig, tmp_path: Path):
    """Losses as small as those of a large picture, whose gradients float16 does not have."""
    norms = {}
    for dtype in ("float32", "float16"):
        run = prepare(make_config(tmp_path / dtype, f"model.dtype={dtype}", "evaluation.num_prompts=1"))
        original = run.algorithm.losses  # pyright: ignore[reportAttributeAccessIssue]

        def losses(*arguments: Any, original: Any = original) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            values, metrics = original(*arguments)
            return values * 1e-7, metrics

        run.algorithm.losses = losses  # pyright: ignore[reportAttributeAccessIssue]
        norms[dtype] = iterate(run)["lora/grad_norm"]
        assert len(state(run)["scaler"]) == (5 if dtype == "float16" else 0)
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.2)


def tensors_in(nested: Any) -> list[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [tensor for value in nested.values() for tensor in tensors_in(value)] if isinstance(nested, dict) else []


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_an_8_bit_optimizer_steps_and_resumes_bit_for_bit(name: str, make_config: MakeConfig, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    settings = [f"optimizer.name={name}", "lora.rank=16", "trainer.save_every=1", "evaluation.num_prompts=1"]
    run = prepare(make_config(tmp_path / "whole", *settings))
    before = weights(run)
    complete(run)
    assert not any(torch.equal(before[key], weight) for key, weight in weights(run).items())
    state = checkpoints.load("latest", tmp_path / "whole", "cpu")
    assert any(tensor.dtype == torch.uint8 for tensor in tensors_in(state["optimizer"]))

    middle = checkpoints.checkpoint_dir(tmp_path / "whole", 1)
    resumed = prepare(make_config(tmp_path / "resumed", *settings, f"resume={middle}"))
    assert resumed.iteration == 1
    complete(resumed)
    assert_same_state(checkpoints.load("latest", tmp_path / "resumed", "cpu"), state)
    assert without_times(read_rows(tmp_path / "resumed")) == without_times(read_rows(tmp_path / "whole"))[2:]


# What goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_update(value: float, make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path, "trainer.num_iterations=1"))
    next(iter(run.lora_step.parameters.values())).register_hook(lambda gradient: torch.full_like(gradient, value))
    before = weights(run)
    complete(run)
    row = read_rows(tmp_path)[-1]
    assert row["policy/skipped_updates"] == 2
    assert row["lora/grad_norm"] is None
    assert same(before, weights(run))


def test_ten_skipped_updates_in_a_row_end_the_run_with_what_was_made_on_disk(make_config: MakeConfig, tmp_path: Path):
    settings = ["trainer.num_iterations=20", "trainer.save_every=2", "algorithm.updates_per_rollout=4"]
    run = prepare(make_config(tmp_path, *settings, "evaluation.num_prompts=1"))
    # An update has 2 transitions. The first is well, then 9 are not, 1 is, and from then on none.
    poison(run, lambda number: 2 <= number < 20 or number >= 22)
    with pytest.raises(UserError, match=r"13 updates in a row .* lower optimizer.learning_rate \(0.01\)"):
        complete(run)
    assert [row["policy/skipped_updates"] for row in read_rows(tmp_path)[1:]] == [3, 4, 3, 4, 4]
    assert checkpoints.load("latest", tmp_path, "cpu")["iteration"] == 5


def test_weights_that_are_no_longer_finite_end_the_run_by_name():
    parameter = torch.nn.Parameter(torch.full((3,), 3.4e38))
    config = OptimizerConfig(learning_rate=1e37, weight_decay=0)
    step = LoraStep(config, {"weight": parameter}, Processes(), torch.float32, torch.device("cpu"))
    step.set_rate(0, 1)
    step.check_progress()
    step.backward(-parameter.sum() * 1e-3)
    step.take(finite=True, empty=False)
    with pytest.raises(UserError, match="weights are no longer finite; lower optimizer.learning_rate"):
        step.check_progress()
