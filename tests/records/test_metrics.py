"""`metrics.jsonl` is strict JSON, survives a crash, and knows what a resumed run repeats."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from ngrpo_lora.records.metrics import (
    MetricsFile,
    has_same_prompts,
    held_out_series,
    prompt_sets,
    read_metrics,
    read_paired,
    read_scores,
    save_scores,
)


def test_every_step_is_a_line_on_disk_at_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, None)
    file.write(0, {"eval/reward_mean": 0.5})
    file.write(1, {"lora/grad_norm": 2.0})
    assert read_metrics(path) == [{"step": 0, "eval/reward_mean": 0.5}, {"step": 1, "lora/grad_norm": 2.0}]


def test_an_evaluation_completes_the_line_of_its_step_also_after_a_resume(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, None)
    file.write(1, {"a": 1.0})
    file.write(2, {"a": 2.0})
    assert not file.has("eval/b")
    file.write(2, {"eval/b": 3.0})
    whole = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "eval/b": 3.0}]
    assert file.has("eval/b")
    assert read_metrics(path) == whole
    MetricsFile(path, None).write(1, {"a": 1.0})
    MetricsFile(path, 1).write(2, {"a": 2.0})
    resumed = MetricsFile(path, 2)
    assert not resumed.has("eval/b")
    resumed.write(2, {"eval/b": 3.0})
    assert read_metrics(path) == whole


def test_a_line_that_is_no_text_is_dropped(tmp_path: Path):
    """As a disk may leave it when the power fails."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n\xff\xfe{"step": 1}\n\0\0\0\n{"step": 2}\n')
    assert [row["step"] for row in read_metrics(path)] == [0, 2]


def test_what_is_not_finite_is_null(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, None).write(1, {"a": math.nan, "b": -math.inf, "c": 1.5})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": 1.5}


def test_a_resumed_run_keeps_lines_up_to_its_checkpoint_and_drops_a_torn_one(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "a": null}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rol')
    assert len(read_metrics(path)) == 4
    MetricsFile(path, 2).write(3, {"a": 7.0})
    assert path.read_text() == '{"step": 0}\n{"step": 1, "a": null}\n{"step": 2}\n{"step": 3, "a": 7.0}\n'


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    MetricsFile(path, None)
    assert path.read_text() == ""


def test_a_run_resumed_into_a_new_folder_has_no_lines_to_keep(tmp_path: Path):
    MetricsFile(tmp_path / "metrics.jsonl", 5).write(6, {})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 6}]


def save_evaluation(folder: Path, step: int, seeds: list[int], **scores: list[float]) -> None:
    tensors = {label: torch.tensor(values) for label, values in scores.items()}
    save_scores(folder / "evaluations" / f"{step:06d}.jsonl", [f"p{seed % 2}" for seed in seeds], seeds, tensors)


def test_scores_of_evaluations_are_read_as_they_are_and_in_the_rows_of_the_first(tmp_path: Path):
    save_evaluation(tmp_path, 0, [5, 6, 7], a=[1.0, 2.0, math.nan], b=[4.0, 5.0, 6.0])
    save_evaluation(tmp_path, 7, [7, 9, 5, 8], a=[10.0, 20.0, 30.0, 40.0], c=[1.0] * 4)
    scores, paired = read_scores(tmp_path), read_paired(tmp_path)
    assert [*scores] == [*paired] == [0, 7]
    np.testing.assert_array_equal(scores[7]["a"], [10, 20, 30, 40])
    assert [[*found] for found in paired.values()] == [["a", "b"]] * 2
    np.testing.assert_array_equal(paired[0]["a"], [1, 2, math.nan])
    np.testing.assert_array_equal(paired[7]["a"], [30, math.nan, 10])
    np.testing.assert_array_equal(paired[7]["b"], [math.nan] * 3)


def save_edits(folder: Path, step: int, pictures: list[str], scores: list[float]) -> None:
    path = folder / "evaluations" / f"{step:06d}.jsonl"
    save_scores(path, ["p"] * len(scores), [*range(len(scores))], {"a": torch.tensor(scores)}, pictures)


def test_edits_of_other_pictures_are_other_prompts(tmp_path: Path):
    for step, pictures in ((0, ["x", "y+m"]), (2, ["x", "y+m"]), (4, ["x", "y+n"]), (6, ["x", "y"])):
        save_edits(tmp_path, step, pictures, [1.0, 2.0])
    assert prompt_sets(tmp_path) == {0: 0, 2: 0, 4: 1, 6: 2}
    assert not has_same_prompts(tmp_path)
    np.testing.assert_array_equal(read_paired(tmp_path)[2]["a"], [1, 2])
    np.testing.assert_array_equal(read_paired(tmp_path)[4]["a"], [1, math.nan])
    assert [[*found] for found in read_scores(tmp_path).values()] == [["a"]] * 4


def test_an_evaluation_of_an_earlier_version_pairs_with_one_that_says_its_pictures(tmp_path: Path):
    save_edits(tmp_path, 0, [], [1.0, 2.0])
    save_edits(tmp_path, 2, ["x", "y"], [3.0, 4.0])
    assert has_same_prompts(tmp_path)
    np.testing.assert_array_equal(read_paired(tmp_path)[2]["a"], [3, 4])
    save_edits(tmp_path, 4, ["x", "z"], [3.0, 4.0])
    assert prompt_sets(tmp_path) == {0: 0, 2: 0, 4: 1}


def test_evaluations_of_texts_say_nothing_of_pictures(tmp_path: Path):
    save_edits(tmp_path, 0, [], [1.0])
    save_edits(tmp_path, 2, [""], [1.0])
    for path in (tmp_path / "evaluations").iterdir():
        assert json.loads(path.read_text()) == {"prompt": "p", "seed": 0, "a": 1.0}


def test_evaluations_of_other_prompts_are_told_from_those_of_the_same(tmp_path: Path):
    assert has_same_prompts(tmp_path)
    for step, seeds in ((0, [5, 6]), (2, [6, 5]), (4, [5, 6, 7]), (6, [1, 2])):
        save_evaluation(tmp_path, step, seeds, a=[0.0] * len(seeds))
        assert has_same_prompts(tmp_path) is (step < 4)
    assert prompt_sets(tmp_path) == {0: 0, 2: 0, 4: 1, 6: 2}
    save_evaluation(tmp_path, 8, [5, 6], a=[0.0] * 2)
    assert has_same_prompts(tmp_path)
    rows = [{"step": step, "eval/a_mean": 0.5} for step in (0, 1, 2, 4, 6, 8)]
    assert held_out_series(rows, "eval/a_mean", prompt_sets(tmp_path), "a") == {
        "a": [(step, 0.5) for step in (0, 1, 2, 8)],
        "a, other prompts": [(4, 0.5)],
        "a, other prompts (2)": [(6, 0.5)],
    }
