"""An evaluation: fixed seeds, the averaged weights, every score on disk, and rewards that fail at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import FinishedRun, MakeConfig
from PIL import Image
from runs import read_rows, reward_of, same, weights

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.header import read_adapter
from ngrpo_lora.errors import UserError
from ngrpo_lora.evaluation.runs import read_pairs
from ngrpo_lora.records.metrics import has_same_prompts, prompt_sets
from ngrpo_lora.records.pictures import read_png_text
from ngrpo_lora.reports.grids import are_paired
from ngrpo_lora.sampling.sampler import draw
from ngrpo_lora.training.evaluation import draw_held_out
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete


def test_evaluation_draws_fixed_seeds_with_the_averaged_weights(finished_run: FinishedRun):
    run, row = finished_run.run, read_rows(finished_run.output_dir)[-1]
    text = run.family.encode([prompt.text for prompt in run.held_out])
    seeds = [run.config.evaluation.seed + i for i in range(2)]

    def redness() -> float:
        images = draw(run.family, text, seeds, "dpmpp_2m", run.schedule.sigmas)
        return sum(np.asarray(image)[..., 0].mean() / 255 for image in images) / 2

    with lora.swapped(run.family.transformer, run.lora_step.averaged):
        assert row["eval/reward_mean"] == pytest.approx(redness(), abs=1e-9)
    assert row["eval/reward_mean"] != pytest.approx(redness(), abs=1e-9)


def test_an_evaluation_has_a_solver_and_steps_of_its_own_which_the_adapter_names(
    make_config: MakeConfig, tmp_path: Path
):
    settings = ["trainer.num_iterations=1", "evaluation.solver=euler", "evaluation.num_steps=6"]
    run = prepare(make_config(tmp_path, *settings))
    complete(run)
    text = run.family.encode([prompt.text for prompt in run.held_out])
    images = draw(run.family, text, [1000, 1001], "euler", run.family.sigmas(6))
    expected = sum(np.asarray(image)[..., 0].mean() / 255 for image in images) / 2
    row = read_rows(tmp_path)[-1]
    assert row["eval/reward_mean"] == pytest.approx(expected, abs=1e-9)
    assert row["nfe/old_per_sample"] == 4 + 0.5  # the rollout's own steps, and the second update's old velocities
    said = read_adapter(tmp_path / "adapter" / FILE_NAME).rollout
    assert (said.solver, said.num_steps) == ("euler", 6)


def test_an_evaluation_in_batches_draws_the_same_pictures_but_for_rounding(make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path, "evaluation.num_prompts=5", "evaluation.micro_batch_size=3"))
    passes: list[int] = []
    run.family.transformer.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    together = draw_held_out(run, range(5))
    assert passes == [3] * 4 + [2] * 4  # of 4 steps
    text = run.family.encode([prompt.text for prompt in run.held_out])
    alone = draw(run.family, text, [*range(1000, 1005)], "dpmpp_2m", run.schedule.sigmas)
    assert len(together) == 5
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_an_evaluation_leaves_every_score_by_prompt_and_seed(finished_run: FinishedRun):
    rows = [json.loads(line) for line in (finished_run.output_dir / "evaluations" / "000004.jsonl").open()]
    texts = [prompt.text for prompt in finished_run.run.held_out]
    assert [(row["prompt"], row["seed"]) for row in rows] == [(texts[0], 1000), (texts[1], 1001)]
    last = read_rows(finished_run.output_dir)[-1]
    for label in ("redness", "world_strict"):
        assert sum(row[label] for row in rows) / 2 == pytest.approx(last[f"eval/{label}_mean"])


def test_edits_of_pictures_that_were_overwritten_are_not_compared(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for name in "ab":
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "e.csv").write_text("prompt,source\nmake it blue,a.png\nmake it green,b.png\n")
    table, output = tmp_path / "e.csv", tmp_path / "run"
    settings = ["model.path=embedded-edit", f"prompts.train={table}", f"prompts.held_out={table}"]
    settings += ["evaluation.strict=null", "trainer.num_iterations=1"]
    complete(prepare(make_config(output, *settings)))
    assert has_same_prompts(output)
    assert len(read_pairs(output).seeds) == 2
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    settings[-1] = "trainer.num_iterations=2"
    complete(prepare(make_config(output, *settings, "resume=latest")))
    assert prompt_sets(output) == {0: 0, 1: 0, 2: 1}
    assert read_pairs(output).prompts == ["make it green"]
    shown = [read_png_text(output / "samples" / part / f"{i}.png") for i in range(2) for part in ("first", "last")]
    assert sorted(map(are_paired, shown[::2], shown[1::2])) == [False, True]
    assert [f"pictures of prompts.{key} ({table})" for key in ("train", "held_out")] == [
        record.args[0] for record in caplog.records if "have changed since this run began" in record.msg
    ]


@pytest.mark.parametrize("watched", [False, True])
def test_a_reward_that_fails_from_the_start_ends_the_run_before_it_trains(
    watched: bool, make_config: MakeConfig, tmp_path: Path
):
    reward = reward_of(tmp_path, "1 / 0")
    run = prepare(make_config(tmp_path / "run", f"evaluation.{reward}" if watched else reward))
    before = weights(run)
    with pytest.raises(UserError, match=r"evaluation of the base model: reward reward has no score for any image"):
        complete(run)
    assert same(before, weights(run))
    assert read_rows(tmp_path / "run") == []
