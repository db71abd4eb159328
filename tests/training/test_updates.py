"""The updates of an iteration: the same whatever saves memory, and skipped where a loss is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from runs import ONE_UPDATE, one_update, poison, read_rows, same, weights

from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.micro_batch_size=1"],
        ["trainer.micro_batch_size=3"],
        ["trainer.gradient_checkpointing=true"],
        ["rollout.micro_batch_size=1"],
        ["rollout.merge_adapter=true"],
    ],
    ids=lambda settings: settings[0].removeprefix("trainer."),
)
def test_memory_levers_change_no_figure(
    settings: list[str], plain_update: Any, make_config: MakeConfig, tmp_path: Path
):
    """Micro-batches of 8 x 1, 3 + 3 + 2 or 1 x 8, recomputed activations, a merged adapter: same update, same count."""
    expected, expected_row, _ = plain_update
    gradients, row, run = one_update(make_config(tmp_path, *ONE_UPDATE, *settings))
    assert run.family.transformer.is_gradient_checkpointing == ("gradient_checkpointing" in settings[0])
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert scale > 0
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * scale)
    for key, value in expected_row.items():
        if not key.startswith("time/"):
            assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_unchanged_weights_in_a_later_update_have_a_log_ratio_of_exactly_0(make_config: MakeConfig, tmp_path: Path):
    """With a vanishing rate the second update's old velocities, computed apart, are its new ones to the bit."""
    run = prepare(
        make_config(tmp_path, "trainer.num_iterations=1", "optimizer.learning_rate=1e-30", "trainer.micro_batch_size=3")
    )
    complete(run)
    row = read_rows(tmp_path)[-1]
    assert row["policy/max_abs_log_ratio"] == 0
    assert row["policy/clip_fraction"] == 0
    assert row["lora/grad_norm"] > 0


def test_a_loss_that_is_nan_skips_its_update_alone_and_is_counted(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """One of the four transitions of the first of two updates."""
    run = prepare(make_config(tmp_path, "trainer.num_iterations=1", "trainer.micro_batch_size=1"))
    poison(run, lambda number: number == 1)
    before, after_skip = weights(run), []
    step = run.lora_step.optimizer.step
    run.lora_step.optimizer.step = lambda *args: (after_skip.append(weights(run)), step(*args))[1]  # pyright: ignore
    complete(run)
    assert len(after_skip) == 1
    assert same(before, after_skip[0])
    assert not same(before, weights(run))
    assert all(parameter.isfinite().all() for parameter in run.lora_step.parameters.values())
    assert read_rows(tmp_path)[-1]["policy/skipped_updates"] == 1
    assert "iteration 1: loss or gradient is not finite; update skipped" in caplog.text
