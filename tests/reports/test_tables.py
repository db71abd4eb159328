"""Tables in Markdown, and a run's figures in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ngrpo_lora.records.metrics import save_scores
from ngrpo_lora.reports.tables import comparison_table, figures, figures_table, markdown_table

FIRST = {"eval/reward_mean": 0.25, "eval/strict_accuracy": 0.125, "eval/world_mean": 0.25}
LAST = {"eval/reward_mean": 0.75, "eval/strict_accuracy": 0.5, "eval/world_mean": 0.75}


def write_run(folder: Path, *rows: Mapping[str, float | None]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": 4 * i, **row}) + "\n" for i, row in enumerate(rows))
    )
    return folder


def test_figures_are_before_and_after_and_of_several_rewards_each(tmp_path: Path):
    one = [
        "held-out reward           before 0.250  after 0.750  (+0.500)",
        "held-out strict accuracy  before 0.125  after 0.500  (+0.375)",
    ]
    assert figures(write_run(tmp_path / "one", FIRST, LAST)) == one
    others = {"eval/a_mean": 2.0, "eval/b_mean": None}
    last = {"eval/a_mean": 1.5, "eval/b_mean": None}
    assert figures(write_run(tmp_path / "several", FIRST | others, LAST | last)) == [
        *one,
        "held-out world            before 0.250  after 0.750  (+0.500)",
        "held-out a                before 2.000  after 1.500  (-0.500)",
    ]


def test_figures_are_a_table_too(tmp_path: Path):
    assert figures_table(write_run(tmp_path / "run", FIRST, LAST)).splitlines() == [
        "| held-out | before | after | change |",
        "| --- | --- | --- | --- |",
        "| reward | 0.250 | 0.750 | +0.500 |",
        "| strict accuracy | 0.125 | 0.500 | +0.375 |",
    ]


def test_figures_end_with_the_measures_that_both_evaluations_have(tmp_path: Path):
    first = FIRST | {"eval/hue_bits": 2.5, "eval/background_spread": 8.0, "eval/gone": 1.0}
    run = write_run(tmp_path / "run", first, {"eval/hue_bits": None}, LAST | {"eval/hue_bits": 1.0, "eval/new": 1.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "rollout/reward_mean": 0.5}) + "\n")
    assert figures(run)[2:] == ["held-out hue_bits         before 2.500  after 1.000  (-1.500)"]
    wide = figures(write_run(tmp_path / "wide", first, LAST | {"eval/background_spread": 4.0}))
    assert wide[-1] == "held-out background_spread before 8.000  after 4.000  (-4.000)"
    assert {line.index("before") for line in wide} == {27}


def test_a_table_counts_all_time_and_leaves_empty_what_was_not_evaluated(tmp_path: Path):
    timed = write_run(tmp_path / "timed", FIRST | {"time/evaluation_s": 60.0}, LAST | {"time/rollout_s": 30.0})
    bare = write_run(tmp_path / "bare", {"time/update_s": None})
    assert comparison_table([timed, bare]).splitlines() == [
        "| run | iterations | minutes | reward | strict accuracy |",
        "| --- | --- | --- | --- | --- |",
        "| timed | 4 | 1.5 | 0.250 → 0.750 | 12.5% → 50.0% |",
        "| bare | 0 | 0.0 |  |  |",
    ]


def test_a_table_has_a_line_for_the_head_its_alignment_and_every_row():
    assert markdown_table(["", "count"], [["a", 1], ["b", None]]).splitlines() == [
        "|  | count |",
        "| --- | --- |",
        "| a | 1 |",
        "| b | None |",
    ]
    assert "| :---: | :---: |" in markdown_table(["a", "b"], [], ":---:")


def test_no_difference_is_told_of_other_prompts(tmp_path: Path):
    run = write_run(tmp_path / "run", FIRST, LAST)
    for step, seed in ((0, 5), (4, 6)):
        save_scores(run / "evaluations" / f"{step:06d}.jsonl", ["a"], [seed], {"world": torch.zeros(1)})
    assert figures(run)[0] == "held-out reward           before 0.250  after 0.750  (other prompts)"
    assert figures_table(run).splitlines()[2] == "| reward | 0.250 | 0.750 | other prompts |"
    row = "| run | 4 | 0.0 | 0.250 → 0.750 (other prompts) | 12.5% → 50.0% (other prompts) |"
    assert comparison_table([run]).splitlines()[-1] == row


def test_a_figure_of_one_evaluation_alone_is_not_compared(tmp_path: Path):
    """A watched reward that was added or taken out on the way, and so the pass-or-fail one."""
    first, last = ({key: row[key] for key in row if key != "eval/strict_accuracy"} for row in (FIRST, LAST))
    left, kept = {"eval/a_mean": 2.0, "eval/b_mean": 1.0}, {"eval/a_mean": 3.0}
    rows = [first | left, last | left, LAST | kept, {"rollout/reward_mean": 0.5}]
    run = write_run(tmp_path / "run", *rows)
    assert [line[9:19].strip() for line in figures(run)] == ["reward", "world", "a"]
    assert comparison_table([run]).splitlines()[-1] == "| run | 12 | 0.0 | 0.250 → 0.750 |  |"
