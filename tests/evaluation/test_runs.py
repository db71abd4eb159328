"""A run's last evaluation against its first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation import runs
from ngrpo_lora.evaluation.statistics import mean_interval
from ngrpo_lora.records.metrics import PICTURES


def test_a_runs_evaluations_are_paired_by_prompt_and_seed(tmp_path: Path):
    first = [{"prompt": p, "seed": s, "r": 0.1 * s} for s, p in enumerate("aabbcc")]
    last = [{"prompt": p, "seed": s, "r": None if s == 5 else 0.3 * s} for s, p in enumerate("aabbcc")][::-1]
    run = tmp_path / "run"
    (run / "evaluations").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"'.*run' has 0 of them"):
        runs.compare_evaluations(run, tmp_path)
    for step, rows in ((0, first), (2, first[:1]), (10, last)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "evaluations" / f"{step:06d}.jsonl").write_text(lines)
    (found,) = runs.compare_evaluations(run, tmp_path)
    assert (found.label, found.reference, found.pairs, found.failed) == ("run @ 10", "@ 0", 5, 1)
    assert found.difference.value == pytest.approx(0.4)
    assert found.difference == mean_interval([0.3 * s - 0.1 * s for s in range(5)], "aabbc")
    assert found.win_rate.value == pytest.approx(0.9)
    assert json.loads((tmp_path / "run.json").read_text())["measures"] == []
    assert (tmp_path / "run.csv").read_text().splitlines()[-1] == "run,c,5,r,0.5,"


def test_wordings_of_one_scene_are_one_draw(tmp_path: Path):
    """Counted by their wording, intervals over the embedded world's held-out captions are too narrow."""
    prompts = ["a red star", "a photo of a red star", "a blue heart", "a photo of a blue heart"]
    (tmp_path / "run" / "evaluations").mkdir(parents=True)
    for step, scores in ((0, [0.0] * 4), (8, [0.5, 0.6, 0.1, 0.2])):
        rows = [
            {"prompt": text, "seed": i, "r": score} for i, (text, score) in enumerate(zip(prompts, scores, strict=True))
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "run" / "evaluations" / f"{step:06d}.jsonl").write_text(lines)
    (found,) = runs.compare_evaluations(tmp_path / "run", tmp_path)
    assert found.difference == mean_interval([0.5, 0.6, 0.1, 0.2], "aabb")


def test_measures_of_runs_are_told_before_and_after_beside_their_scores(tmp_path: Path):
    for name, values in (("one", [2.5, 2.0, 1.5]), ("none", [])):
        (tmp_path / name / "evaluations").mkdir(parents=True)
        for step in (0, 4):
            line = json.dumps({"prompt": "a", "seed": 0, "r": step})
            (tmp_path / name / "evaluations" / f"{step:06d}.jsonl").write_text(line)
        rows = [
            {"step": 2 * i, "eval/reward_mean": 0.5, "eval/r_mean": 0.5, "eval/strict_accuracy": 1.0}
            | ({"eval/hue_bits": values[i]} if values else {})
            for i in range(3)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runs.measures_table([tmp_path / "none", tmp_path / "one"]).splitlines() == [
        "|  | measure | before | after | difference |",
        "| --- | --- | --- | --- | --- |",
        "| one | hue_bits | 2.500 | 1.500 | -1.000 |",
    ]
    assert runs.measures_table([tmp_path / "none"]) == ""
    (tmp_path / "one" / "evaluations" / "000004.jsonl").write_text('{"prompt": "a", "seed": 1, "r": 4}')
    assert runs.measures_table([tmp_path / "one"]).endswith("| one | hue_bits | 2.500 | 1.500 | other prompts |")
    (tmp_path / "one" / "evaluations" / "000004.jsonl").write_text('{"prompt": "a", "seed": 0, "r": 4}')
    runs.compare_evaluations(tmp_path / "one", tmp_path)
    found = json.loads((tmp_path / "one.json").read_text())["measures"]
    assert found == [{"measure": "hue_bits", "before": 2.5, "after": 1.5}]


def test_edits_of_other_pictures_are_no_pair(tmp_path: Path):
    (tmp_path / "evaluations").mkdir()
    for step, last in ((0, "y"), (2, "z")):
        rows = [{"prompt": "a", "seed": i, PICTURES: one, "r": step + i} for i, one in enumerate(["x", last])]
        (tmp_path / "evaluations" / f"{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = runs.read_pairs(tmp_path)
    assert (pairs.seeds, pairs.before, pairs.after) == ([0], {"r": [0]}, {"r": [2]})
    path = tmp_path / "evaluations" / "000002.jsonl"
    path.write_text(path.read_text().replace('"x"', '"w"'))
    with pytest.raises(ConfigError, match="have no prompt and seed, of the same picture to edit, in common"):
        runs.read_pairs(tmp_path)
