"""Function evaluations against a hook of the test's own and a closed form, and the memory of each stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import FinishedRun, MakeConfig
from runs import read_rows

from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete


def test_function_evaluations_are_those_of_the_transformer(finished_run: FinishedRun):
    """Against a hook of the test's own, which also sees the evaluations and the export check."""
    rows, samples = read_rows(finished_run.output_dir)[1:], 2 * 4
    assert finished_run.rows_with_gradient == sum(row["nfe/theta_per_sample"] for row in rows) * samples
    evaluations, export_check = 3 * 2 * 4, 4
    counted = sum(row["nfe/old_per_sample"] for row in rows) * samples
    assert finished_run.rows_without_gradient == counted + evaluations + export_check


@pytest.mark.parametrize(
    ("anchors", "steps", "updates", "reference"), [(2, 2, 2, 0.0), (1, 2, 1, 0.0), (4, 3, 3, 0.0), (2, 3, 2, 0.1)]
)
def test_nfe_closed_form(
    anchors: int, steps: int, updates: int, reference: float, make_config: MakeConfig, tmp_path: Path
):
    """theta = B K / G; old = rollout steps + what the later updates need anew (+ B K / G for a reference term)."""
    run = prepare(
        make_config(
            tmp_path,
            "trainer.num_iterations=1",
            "trainer.micro_batch_size=3",
            f"algorithm.num_anchors={anchors}",
            f"algorithm.num_train_steps={steps}",
            f"algorithm.updates_per_rollout={updates}",
            f"algorithm.reference_weight={reference}",
        )
    )
    complete(run)
    row, trained = read_rows(tmp_path)[-1], anchors * steps / 4
    assert row["nfe/theta_per_sample"] == trained
    later = trained * (updates - 1) / updates
    assert row["nfe/old_per_sample"] == 4 + later + (trained if reference else 0)


@pytest.mark.gpu
def test_a_run_on_a_gpu_says_what_each_stage_held(make_config: MakeConfig, tmp_path: Path):
    complete(prepare(make_config(tmp_path, "model.device=cuda", "evaluation.num_prompts=1")))
    first, *rows = read_metrics(tmp_path / "metrics.jsonl")
    assert first["memory/evaluation_gib"] > 0
    assert all(row["memory/update_gib"] > row["memory/reward_gib"] > 0 for row in rows)
