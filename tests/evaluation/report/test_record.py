"""What a run's folder holds, read for its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MakeConfig
from PIL import Image

from ngrpo_lora.config import TrainerConfig
from ngrpo_lora.evaluation.report.record import GROUP_PX, Record, names, save_group
from ngrpo_lora.records.metrics import PICTURES
from ngrpo_lora.records.pictures import read_png_text, save_png


def test_a_record_says_where_its_run_stands(write_run):
    record = write_run(iterations=4)
    assert record.state == "stopped after iteration 4 of 10"
    assert replace(record, is_running=True).state == "running, iteration 4 of 10"
    assert write_run("whole").state == "finished, 10 iterations"
    patience = TrainerConfig(num_iterations=20, keep_best="-eval/reward_mean", early_stopping_patience=1)
    early = replace(record, config=record.config.model_copy(update={"trainer": patience}))
    assert early.state == "finished early after iteration 4 of 20"
    assert record.seconds == pytest.approx(2 * 3.0 + 4 * 3.5)


def test_scores_and_pictures_are_those_of_the_first_and_last_evaluation(write_run):
    record = write_run()
    assert record.strict == "world_strict"
    by_reward = {found.reward: found for found in record.differences}
    assert by_reward["world"].difference.value == pytest.approx(0.5)
    assert [(shown.seed, shown.after is not None) for shown in record.shown] == [("7", True), ("9", True)]
    first_only = replace(record, rows=record.rows[:1])
    assert [shown.after for shown in first_only.shown] == [None, None]  # they are of a run before


def test_pictures_of_another_prompt_or_seed_are_no_pair(write_run):
    record = write_run()
    last = record.folder / "samples" / "last"
    for text in ({"prompt": "a red star", "seed": "8"}, {"prompt": "a blue star", "seed": "7"}, {}):
        save_png(last / "0.png", Image.new("RGB", (64, 64)), text)
        again = Record.read(record.folder, record.config, is_running=False)
        assert [(shown.seed, shown.after) for shown in again.shown] == [("7", None), ("9", last / "2.png")]


def test_edits_of_other_pictures_are_no_pair(write_run):
    record = write_run()
    for part, digests in (("first", "xx"), ("last", "xy"), ("sources", "xy")):
        for name, seed, digest in zip(("0.png", "2.png"), "79", digests, strict=True):
            path = record.folder / "samples" / part / name
            before = read_png_text(record.folder / "samples" / "first" / name)
            save_png(path, Image.new("RGB", (64, 64)), before | {"seed": seed, PICTURES: digest})
    again = Record.read(record.folder, record.config, is_running=False)
    assert [(one.after is None, one.source is None) for one in again.shown] == [(False, False), (True, True)]


def test_a_group_is_kept_small_and_read_best_first(write_run, tmp_path: Path):
    record = write_run()
    assert [(one.reward, one.path.name) for one in record.group] == [(0.75, "1.png"), (0.5, "2.png"), (0.25, "0.png")]
    assert replace(record, rows=record.rows[:5]).group == []  # the run has gone back behind it
    save_group(record.folder, 3, "a", [Image.new("RGB", (2 * GROUP_PX, GROUP_PX))], [float("nan")])
    (one,) = Record.read(record.folder, record.config, False).group  # the group before is gone
    assert (one.iteration, one.prompt, Image.open(one.path).size) == (3, "a", (GROUP_PX, GROUP_PX // 2))


def test_a_run_without_a_second_evaluation_and_without_pictures_has_none(make_config: MakeConfig, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/reward_mean": 0.5}\n')
    record = Record.read(tmp_path, make_config(tmp_path), True)
    assert (record.pairs, record.differences, record.shown, record.group, record.adapter) == (None, [], [], [], None)


def test_runs_are_named_by_as_much_of_their_path_as_it_takes():
    assert names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert names([Path("/a/p/0"), Path("/a/q/0")]) == ["p/0", "q/0"]
    assert names([Path("/a/x"), Path("/a/x")]) == ["x", "x"]
