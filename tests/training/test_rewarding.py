"""Rewards of an iteration: scored while others are drawn, masked where they fail, and reported each."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from runs import EVERY_STEP, assert_same_run, read_rows, reward_of

from ngrpo_lora.errors import UserError
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.records import checkpoints
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete


def watch_advantages(run: Run) -> list[torch.Tensor]:
    seen, advantages = [], run.algorithm.advantages
    run.algorithm.advantages = lambda batch: seen.append(advantages(batch)) or seen[-1]  # pyright: ignore
    return seen


def test_groups_are_scored_while_others_are_still_drawn(make_config: MakeConfig, tmp_path: Path):
    """The first group's reward waits until the second group is being rolled out."""
    run = prepare(make_config(tmp_path / "run", "trainer.num_iterations=1", "evaluation.strict=null"))
    (reward,) = run.scorer.rewards.values()
    score, rollout, second, groups = reward.function, run.algorithm.rollout, threading.Event(), []

    def watch_rollout(*arguments: Any) -> Any:
        groups.append(1)
        if len(groups) == 2:
            second.set()
        return rollout(*arguments)

    def wait(images: Any, prompts: Any, metadata: Any) -> Any:
        if len(images) == 4:  # no evaluation
            assert second.wait(30)
        return score(images, prompts, metadata)

    run.algorithm.rollout, reward.function = watch_rollout, wait  # pyright: ignore
    complete(run)
    assert read_rows(tmp_path / "run")[-1]["rollout/failed_share"] == 0


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_whose_latents_are_not_finite_has_no_score(value: float, make_config: MakeConfig, tmp_path: Path):
    """The third of the first group's four samples, whose picture has a score like any other."""
    run = prepare(make_config(tmp_path / "run", "trainer.num_iterations=1"))
    rollout, groups, seen = run.algorithm.rollout, [], watch_advantages(run)

    def broken(*arguments: Any) -> Any:
        (group,) = rollout(*arguments)
        if not groups:
            group.final[2, 0, 0, 0] = value
        groups.append(group)
        return [group]

    run.algorithm.rollout = broken  # pyright: ignore
    complete(run)
    row = read_rows(tmp_path / "run")[-1]
    assert row["rollout/failed_share"] == 1 / 8
    assert (seen[0] == 0).nonzero().tolist() == [[0, 2]]


def test_two_rewards_are_trained_on_and_reported_each(make_config: MakeConfig, tmp_path: Path):
    (tmp_path / "two.py").write_text(
        "import numpy as np\n"
        "def red(images, prompts, metadata):\n    return [np.asarray(i)[..., 0].mean() / 255 for i in images]\n"
        "def blue(images, prompts, metadata):\n    return [np.asarray(i)[..., 2].mean() / 255 for i in images]\n"
    )
    red, blue = f"{tmp_path}/two.py:red", f"{tmp_path}/two.py:blue"
    rewards = f"[{red}, {{name: {blue}, weight: -0.5}}]"
    complete(prepare(make_config(tmp_path / "run", "trainer.num_iterations=1", f"rewards={rewards}")))
    row = read_rows(tmp_path / "run")[-1]
    for stage in ("rollout", "eval"):
        parts = row[f"{stage}/red_mean"] - 0.5 * row[f"{stage}/blue_mean"]
        assert row[f"{stage}/reward_mean"] == pytest.approx(parts)
    assert -1 <= row["rollout/correlation/red~blue"] <= 1
    assert row["rollout/red_failed_share"] == row["rollout/blue_failed_share"] == 0


HOSTILE = """
import random, sys, os, warnings, logging
import numpy as np, torch
import tones

def score(images, prompts, metadata):
    scores = [tones.red(image) for image in images]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(True)
    torch.set_default_device("meta")
    os.chdir("/")
    os.environ.clear()
    sys.argv, sys.path[:] = [], []
    warnings.simplefilter("error")
    logging.disable(logging.CRITICAL)
    for image in images:
        image.paste((0, 0, 0), (0, 0, *image.size))
    prompts.clear()
    for one in metadata:
        one.clear()
    images.clear()
    return scores

def blue(images, prompts, metadata):
    assert all(prompts)
    return [float(np.asarray(image)[..., 2].mean()) / 255 for image in images]

def measured(images, prompts):
    assert len(images) == len(prompts) == 2
    value = tones.red(images[0])
    images[0].paste((0, 0, 0), (0, 0, *images[0].size))
    prompts.clear()
    torch.set_default_dtype(torch.float64)
    return {"first": value}
"""
BENIGN = """
import numpy as np
import tones

def score(images):
    return [tones.red(image) for image in images]

def blue(images):
    return [float(np.asarray(image)[..., 2].mean()) / 255 for image in images]

def measured(images, prompts):
    return {"first": tones.red(images[0])}
"""


def test_what_a_reward_does_reaches_neither_the_run_nor_another_reward(make_config: MakeConfig, tmp_path: Path):
    """Bit for bit: a run with a hostile reward is that with one of equal scores."""
    red = "import numpy as np\ndef red(image): return float(np.asarray(image)[..., 0].mean()) / 255\n"
    for name, text in (("hostile", HOSTILE), ("benign", BENIGN)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tones.py").write_text(red)
        (folder / "mine.py").write_text(text)
        rewards = f"rewards=[{folder}/mine.py:score, {folder}/mine.py:blue]"
        measures = f"evaluation.measures=[{folder}/mine.py:measured]"
        settings = [rewards, measures, "evaluation.strict=null", "evaluation.every=1", "trainer.num_iterations=2"]
        complete(prepare(make_config(tmp_path / name / "run", *settings)))
    runs = [tmp_path / name / "run" for name in ("hostile", "benign")]
    assert_same_run(*runs)
    for picture in ("samples/000000.png", "samples/000002.png"):
        hostile, benign = ((run / picture).read_bytes() for run in runs)
        assert hostile == benign


# What goes wrong ----------------------------------------------------------------------------------------------------


def test_a_reward_that_is_nan_masks_its_sample_and_is_counted(make_config: MakeConfig, tmp_path: Path):
    """NaN for the first of every four images, else 2, 4, 1 fifths."""
    reward = reward_of(tmp_path, "[float('nan') if i % 4 == 0 else i * 7 % 5 / 5 for i in range(len(images))]")
    run = prepare(make_config(tmp_path / "run", "trainer.num_iterations=1", reward))
    seen = watch_advantages(run)
    complete(run)
    row = read_rows(tmp_path / "run")[-1]
    assert row["rollout/failed_share"] == 0.25
    assert row["rollout/reward_mean"] == pytest.approx(7 / 15)
    deviations = [-1 / 15, 1 / 3, -4 / 15]
    assert row["rollout/reward_std"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 3))
    assert (row["rollout/zero_spread_share"], row["policy/skipped_updates"]) == (0, 0)
    assert row["lora/grad_norm"] > 0
    assert not seen[0][:, 0].any()
    torch.testing.assert_close(seen[0].square().sum(1), torch.tensor([3.0, 3.0]).double())


def test_a_reward_that_is_the_same_for_all_that_have_one_has_no_gradient(make_config: MakeConfig, tmp_path: Path):
    reward = reward_of(tmp_path, "[float('nan')] + [-97.1] * (len(images) - 1)")
    run = prepare(make_config(tmp_path / "run", "trainer.num_iterations=1", reward))
    seen = watch_advantages(run)
    complete(run)
    row = read_rows(tmp_path / "run")[-1]
    assert (row["rollout/zero_spread_share"], row["rollout/reward_std"]) == (1, pytest.approx(0, abs=1e-12))
    assert row.keys() >= EVERY_STEP
    assert row["policy/entropy"] is None  # no transition was taken
    assert not seen[0].any()
    assert row["lora/grad_norm"] == 0


def test_a_reward_that_breaks_on_the_way_stops_the_run_where_it_can_go_on(make_config: MakeConfig, tmp_path: Path):
    """Three of eight scores are missing in iteration 2: too many for a limit of 0.3, few enough for one of 0.4."""
    settings = ["trainer.num_iterations=3", "evaluation.strict=null", "evaluation.every=3"]
    complete(prepare(make_config(tmp_path / "whole", *settings)))

    run = prepare(make_config(tmp_path / "run", *settings, "rewards.max_failed_share=0.3"))
    (reward,) = run.scorer.rewards.values()
    score, broken = reward.function, run.prompts.prompt(2).text
    reward.function = lambda images, prompts, metadata: [
        math.nan if prompt == broken and number else value
        for number, (prompt, value) in enumerate(zip(prompts, score(images, prompts, metadata), strict=True))
    ]
    with pytest.raises(UserError, match=r"iteration 2: reward redness has no score for 38% .* resume=latest"):
        complete(run)
    assert checkpoints.load("latest", tmp_path / "run", "cpu")["iteration"] == 1
    complete(prepare(make_config(tmp_path / "run", *settings, "rewards.max_failed_share=0.3", "resume=latest")))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_reward_that_has_no_score_for_any_image_ends_a_run_whatever_the_limit(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = [
        "trainer.num_iterations=2",
        "evaluation.strict=null",
        "evaluation.every=2",
        "rewards.max_failed_share=1",
    ]
    run = prepare(make_config(tmp_path / "run", *settings, "rewards.max_failed_share=1"))
    (reward,) = run.scorer.rewards.values()
    score = reward.function
    reward.function = lambda images, prompts, metadata: (
        [math.nan] * len(images) if run.iteration else score(images, prompts, metadata)
    )
    what = "iteration 2: reward redness has no score for any image; reasons are above; correct it, or what it is given"
    with pytest.raises(UserError, match=f"{what}, then go on with resume=latest"):
        complete(run)
    assert len([text for text in caplog.messages if "returned no finite number" in text]) == 1


def test_a_reward_that_breaks_before_anything_is_made_can_be_replaced_in_the_same_folder(
    make_config: MakeConfig, tmp_path: Path
):
    broken = tmp_path / "broken.py"
    broken.write_text("def score(images, prompts, metadata):\n    return [float('nan')] * len(images)\n")
    settings = ["trainer.num_iterations=1", "evaluation.strict=null"]
    complete(prepare(make_config(tmp_path / "alone", *settings)))
    with pytest.raises(UserError, match="evaluation of the base model"):
        complete(prepare(make_config(tmp_path / "run", *settings, f"rewards={broken}:score")))
    corrected = make_config(tmp_path / "run", *settings)
    check_run(corrected)
    complete(prepare(corrected))
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    with pytest.raises(UserError, match="output_dir must not hold another run"):
        check_run(make_config(tmp_path / "run", *settings, "seed=7"))


# Latents that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("every", [1, 9], ids=["in the evaluation", "in the rollout"])
def test_weights_that_draw_nothing_are_named_and_the_last_that_did_are_kept(
    every: int, make_config: MakeConfig, tmp_path: Path
):
    """A rate of 1e18 in iteration 2; a resumed run with the first one's rate is one that never had another."""
    settings = [
        "trainer.num_iterations=3",
        f"evaluation.every={every}",
        "evaluation.strict=null",
        "trainer.save_every=1",
    ]
    complete(prepare(make_config(tmp_path / "whole", *settings)))

    run = prepare(make_config(tmp_path / "run", *settings))
    set_rate = run.lora_step.set_rate

    def set_too_high(iteration: int, num_iterations: int) -> float:
        rate = set_rate(iteration, num_iterations)
        for group in run.lora_step.optimizer.param_groups:
            group["lr"] = 1e18 if iteration == 1 else rate
        return rate

    run.lora_step.set_rate = set_too_high  # pyright: ignore
    when = "evaluation at iteration 2" if every == 1 else "iteration 3"
    what = rf"{when}: the latents of 100% of the samples are not finite, .* lower optimizer.learning_rate \(0.01\)"
    with pytest.raises(UserError, match=what):
        complete(run)
    assert checkpoints.load("latest", tmp_path / "run", "cpu")["iteration"] == 1
    config = make_config(tmp_path / "run", *settings, "resume=latest")
    check_run(config)
    complete(prepare(config))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
