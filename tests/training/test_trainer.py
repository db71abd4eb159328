"""A run of the embedded model as a whole: what it leaves, what it touches, and that its settings decide it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FinishedRun, MakeConfig
from PIL import Image
from runs import ADAPTER, EVERY_STEP, assert_same_run, read_rows

from ngrpo_lora.config import load_config
from ngrpo_lora.records import checkpoints
from ngrpo_lora.training.evaluation import evaluate
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete, iterate

EVALUATION = {"eval/reward_mean", "eval/strict_accuracy"}


# What a run leaves behind -------------------------------------------------------------------------------------------


def test_every_file_of_a_run_is_there(finished_run: FinishedRun):
    folder = finished_run.output_dir
    assert load_config(folder / "config.yaml") == finished_run.run.config
    grids, shown = ["000000.png", "000002.png", "000004.png"], ["0.png", "1.png"]
    assert sorted(path.name for path in (folder / "samples").glob("*.png")) == grids
    assert [sorted(p.name for p in (folder / "samples" / part).iterdir()) for part in ("first", "last")] == [shown] * 2
    assert [path.name for path in checkpoints.checkpoints(folder)] == ["iteration-000002", "iteration-000004"]
    for picture in [folder / "summary.png", *(folder / "samples").rglob("*.png")]:
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 10, picture
    assert (folder / ADAPTER).is_file()
    assert not list(folder.rglob("*.partial"))


def test_every_line_of_the_metrics_has_its_keys_and_finite_numbers(finished_run: FinishedRun):
    rows = read_rows(finished_run.output_dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert EVALUATION <= rows[0].keys()
    for row in rows[1:]:
        assert row.keys() >= EVERY_STEP
        assert (row.keys() >= EVALUATION) == (row["step"] % 2 == 0)
    assert all(isinstance(value, int | float) and math.isfinite(value) for row in rows for value in row.values())


def test_the_metrics_say_what_happened(finished_run: FinishedRun):
    rows = read_rows(finished_run.output_dir)[1:]
    rates = [1e-2 * factor for factor in (1, 1, 0.75, 0.25)]  # one warm-up, then (1 + cos(pi k / 3)) / 2
    for rate, row in zip(rates, rows, strict=True):
        assert row["lora/learning_rate"] == pytest.approx(rate)
        assert row["rollout/failed_share"] == row["rollout/zero_spread_share"] == row["policy/skipped_updates"] == 0
        assert 0 < row["rollout/reward_mean"] < 1
        assert row["rollout/reward_std"] > 0
        assert row["policy/max_abs_log_ratio"] > 0
        assert 0 < row["policy/entropy"] <= math.log(4)
        assert row["lora/grad_norm"] > 0
        assert all(row[f"time/{stage}_s"] > 0 for stage in ("rollout", "reward", "update"))


def test_a_run_is_a_function_of_its_configuration(finished_run: FinishedRun, make_config: MakeConfig, tmp_path: Path):
    torch.manual_seed(123)  # the global generator must not matter
    complete(prepare(make_config(tmp_path, *finished_run.overrides)))
    assert_same_run(tmp_path, finished_run.output_dir)


# Scope --------------------------------------------------------------------------------------------------------------


def test_a_step_changes_the_adapter_and_nothing_else(finished_run: FinishedRun):
    run = finished_run.run
    live = {"transformer": run.family.transformer, "vae": run.family.vae}
    for part, module in live.items():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            changed = not torch.equal(tensor, finished_run.before[part][name])
            assert changed == (".lora_" in name), name
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in run.lora_step.parameters.items())


def test_rewards_and_updates_see_what_the_rollout_saw(make_config: MakeConfig, tmp_path: Path):
    """Euler's rollout is made of the very transitions that are trained: any other prompt, latent or sigma would show
    as a log ratio, which temperature 1 magnifies: a sigma that is wrong by 1e-4 of itself gives 0.04, rounding up to
    2e-4, and that depends on the processor. The reward gets the pictures of a prompt with that prompt.
    """
    run = prepare(
        make_config(
            tmp_path,
            "trainer.num_iterations=1",
            "rollout.solver=euler",
            "algorithm.old_anchor=rollout",
            "algorithm.temperature=1.0",
            "algorithm.num_anchors=4",
            "algorithm.num_train_steps=4",
            "algorithm.updates_per_rollout=1",
        )
    )
    (reward,) = run.scorer.rewards.values()
    score, seen = reward.function, {}

    def spy(images: Any, prompts: Any, metadata: Any) -> Any:
        seen[prompts[0]] = (images, prompts)  # each group is scored in a thread of its own
        return score(images, prompts, metadata)

    reward.function = spy
    complete(run)
    assert read_rows(tmp_path)[1]["policy/max_abs_log_ratio"] < 2e-3
    groups = [seen[run.prompts.prompt(i).text] for i in range(2)]
    assert [prompts for _, prompts in groups] == [[run.prompts.prompt(i).text] * 4 for i in range(2)]
    assert len({image.tobytes() for images, _ in groups for image in images}) == 8


def test_cudnns_attention_is_left_out_of_every_pass_and_no_longer(make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path, "evaluation.num_prompts=1"))
    seen: set[bool] = set()
    run.family.transformer.register_forward_hook(lambda *_: seen.add(torch.backends.cuda.cudnn_sdp_enabled()))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    iterate(run)
    evaluate(run)
    assert seen == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()
