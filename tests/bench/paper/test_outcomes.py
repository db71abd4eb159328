"""What a run folder says: its compute, its scores, and their changes with intervals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from paper_runs import jobs_of, leave, small_plan

from ngrpo_lora.bench.paper.outcomes import by_method, change, check_whole, evaluated, is_complete, is_trained, read
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.statistics import mean_interval
from ngrpo_lora.records.metrics import read_metrics


def test_compute_is_counted_from_the_metrics(tmp_path: Path):
    job = jobs_of(small_plan(tmp_path, "neighbor-dpmpp-8", budget=50.0))[0]  # 10 forward passes per sample
    leave(job, lambda picture, step: 0.5)
    (outcome,) = read([job])
    assert outcome.last == 5
    assert outcome.spent()[5] == 50
    assert outcome.seconds()[2] == 3.5
    assert outcome.nearest(10) == 1
    assert outcome.nearest(1000) == 5
    assert not outcome.exceeds()
    summary = outcome.summary()
    assert summary["forward_passes_per_sample_counted"] == summary["forward_passes_per_sample_foreseen"] == 50


def test_a_run_is_complete_with_its_last_evaluation_and_its_adapter(tmp_path: Path):
    job = jobs_of(small_plan(tmp_path, budget=50.0))[0]
    assert not is_complete(job)
    leave(job, lambda picture, step: 0.5)
    assert is_complete(job)
    adapter = next((job.folder / "adapter").iterdir())
    adapter.unlink()
    assert not is_complete(job)
    adapter.write_bytes(b"")
    lines = (job.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (job.folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert read_metrics(job.folder / "metrics.jsonl")
    assert read([job]) == []


def test_changes_are_paired_over_prompts_and_over_seeds(tmp_path: Path):
    jobs = jobs_of(small_plan(tmp_path, "neighbor-dpmpp-8", budget=50.0, seeds=2))
    gains = {0: (0.1, 0.3, 0.2, -0.1, -0.3), 1: (0.2, 0.2, 0.2, -0.2, -0.2)}
    for job in jobs:
        leave(job, lambda picture, step, seed=job.seed: 0.1 * picture + (gains[seed][picture] if step else 0.0))
    outcomes = by_method(read(jobs))["neighbor-dpmpp-8"]
    steps = {job.name: 5 for job in jobs}
    found = change(outcomes, steps, "world", trained=True)  # the first three prompts
    assert found.before == pytest.approx(0.1)
    assert found.after == pytest.approx(0.3)
    assert found.pictures == 3
    over_prompts = mean_interval([0.15, 0.25, 0.2], ["a", "b", "c"])
    assert found.over_prompts.value == pytest.approx(over_prompts.value)
    assert found.over_prompts.low == pytest.approx(over_prompts.low)
    left_out = change(outcomes, steps, "world", trained=False)
    assert left_out.over_prompts.value == pytest.approx(-0.2)
    assert left_out.over_seeds.low == pytest.approx(-0.2)
    everything = change(outcomes, steps, "world")
    assert everything.over_seeds.value == pytest.approx(0.04)
    assert "seeds [" in everything.show()


def test_tasks_tell_trained_prompts_from_left_out_ones():
    assert is_trained("a photo of a red star and a blue heart")
    assert not is_trained("three hearts")
    assert is_trained("a corgi")  # of another model's prompts none is left out


def test_a_complete_run_that_has_lost_something_is_told(tmp_path: Path):
    (job,) = jobs_of(small_plan(tmp_path, "neighbor-dpmpp-8", budget=50.0))
    leave(job, lambda picture, step: 0.5)
    check_whole(job)
    metrics, evaluation = job.folder / "metrics.jsonl", max((job.folder / "evaluations").iterdir())
    lines = metrics.read_bytes().splitlines(keepends=True)
    losses = {
        metrics: [b"".join(lines[:2] + lines[3:]), b"".join(lines[1:]), b"".join([lines[0][:5], *lines[1:]])],
        evaluation: [b"", evaluation.read_bytes()[:-9], evaluation.read_bytes().replace(b"world", b"w", 1), None],
        job.folder / "config.yaml": [None],
    }
    for path, contents in losses.items():
        before = path.read_bytes()
        for content in contents:
            path.unlink() if content is None else path.write_bytes(content)
            assert is_complete(job)
            with pytest.raises(ConfigError, match=r"must be whole, but of .*remove that folder, and the same command"):
                check_whole(job)
            path.write_bytes(before)


def test_the_reward_of_an_evaluation_in_which_every_picture_failed_is_no_number(tmp_path: Path):
    (job,) = jobs_of(small_plan(tmp_path, "neighbor-dpmpp-8", budget=50.0))
    leave(job, lambda picture, step: 0.5)
    metrics = job.folder / "metrics.jsonl"
    first, rest = metrics.read_text().split("\n", 1)
    metrics.write_text(first.replace('"eval/reward_mean": 0.5', '"eval/reward_mean": null') + "\n" + rest)
    before, after = evaluated(job.folder)
    assert math.isnan(before)
    assert after == 0.5
