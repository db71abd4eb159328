"""The report is written while a run goes, and never ends it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MakeConfig
from PIL import Image

from ngrpo_lora.evaluation.report import watching
from ngrpo_lora.evaluation.report.record import Record
from ngrpo_lora.evaluation.report.watching import Reporter
from ngrpo_lora.records.files import digest
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.training.watcher import Start

IMAGES = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]


def start(record: Record, is_main: bool = True) -> Start:
    return Start(record.config, 9, 1, is_main, 1, 1)


def test_the_page_comes_after_evaluations_and_at_the_end(write_run):
    record = write_run()
    page, reporter = record.folder / "report.html", Reporter()
    reporter.before_start(start(record))
    reporter.after_rewards("a red star", IMAGES, [0.5, 0.25])
    reporter.after_update(10, {})
    assert not page.exists()
    reporter.after_step(10, {"eval/reward_mean": 0.5})
    assert "running, iteration 10 of 10" in page.read_text(encoding="utf-8")
    found = Record.read(record.folder, record.config, True).group
    assert [(one.prompt, one.iteration, one.reward) for one in found] == [
        ("a red star", 10, 0.5),
        ("a red star", 10, 0.25),
    ]
    reporter.close()
    assert "finished, 10 iterations" in page.read_text(encoding="utf-8")
    page.unlink()
    reporter.after_end(Path("adapter"))
    assert page.exists()


def test_a_real_run_leaves_a_page_with_its_newest_group_and_its_adapter(make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path), Reporter())
    complete(run)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "finished, 2 iterations" in page
    assert f"SHA-256 {digest(tmp_path / 'adapter' / 'pytorch_lora_weights.safetensors')}" in page
    record = Record.read(tmp_path, run.config, False)
    assert [one.iteration for one in record.group] == [2] * 4
    assert record.group[0].prompt in page
    assert page.count('<input type="range"') == 2


def test_a_step_without_an_evaluation_writes_nothing_and_a_half_iteration_keeps_its_group_back(write_run):
    record = write_run()
    reporter = Reporter()
    reporter.before_start(replace(start(record), iteration=10))
    reporter.after_rewards("never updated", IMAGES, [0.5, 0.25])
    reporter.after_step(10, {})
    assert not (record.folder / "report.html").exists()
    reporter.close()
    assert (record.folder / "report.html").exists()
    assert len(Record.read(record.folder, record.config, False).group) == 3  # the one that was there


def test_other_processes_write_nothing(write_run):
    record, reporter = write_run(), Reporter()
    reporter.close()  # of a run that could not start
    reporter.before_start(start(record, is_main=False))
    reporter.after_rewards("a", IMAGES, [0.5, 0.25])
    reporter.after_step(10, {"eval/reward_mean": 0.5})
    reporter.close()
    assert not (record.folder / "report.html").exists()


def test_a_failure_is_logged_once_and_ends_nothing(
    write_run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    record, reporter = write_run(), Reporter()

    def fail(*args: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(watching, "write_report", fail)
    with caplog.at_level(logging.WARNING):
        reporter.before_start(start(record))
        reporter.after_step(10, {"eval/reward_mean": 0.5})
        reporter.close()
    (line,) = caplog.messages
    assert "report.html could not be written (RuntimeError: no room); the run goes on" in line
    assert f"`ngrpo report {record.folder}`" in line
