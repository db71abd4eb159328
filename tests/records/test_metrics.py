"""`metrics.jsonl` is strict JSON, survives a crash, and knows what a resumed run repeats."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ngrpo_lora.records.metrics import MetricsFile, read_metrics


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
