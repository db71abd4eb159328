"""What it costs that a run can be left alone: every part is timed, and their sum is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import MakeConfig

from ngrpo_lora.bench import keeping
from ngrpo_lora.config import RunConfig


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path) -> RunConfig:
    return make_config(tmp_path / "run", "evaluation.every=4", "trainer.num_iterations=8", "evaluation.num_prompts=60")


def test_everything_is_on(config: RunConfig, tmp_path: Path):
    kept = keeping.everything_on(config, tmp_path / "kept")
    assert (kept.trainer.save_every, kept.output_dir, kept.evaluation.num_prompts) == (1, str(tmp_path / "kept"), 48)
    assert [tracker.name for tracker in kept.tracking] == ["tensorboard"]


def test_parts_are_a_share_of_an_iteration_and_add_up(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeping, "MAX_PROMPTS", 1)
    measured = keeping.measure_keeping(config, 2)
    assert list(measured.parts_s) == [
        "metrics.jsonl",
        "warnings",
        "report.html",
        "TensorBoard",
        "checkpoint",
        "rewards as guests",
        "lock of the folder",
    ]
    assert all(0 < seconds < 10 for seconds in measured.parts_s.values())
    assert min(measured.bare_s, measured.kept_s) > 0
    assert not Path(config.output_dir).exists()

    lines: list[str] = []
    monkeypatch.setattr(keeping, "measure_keeping", lambda *_: measured)
    keeping.keeping_table(config, 2, lines.append)
    *parts, total = [float(re.search(r"\| ([\d.]+) ms \|", line)[1]) for line in lines[2:-1]]  # type: ignore[index]
    assert sum(parts) == pytest.approx(total, abs=0.01 * len(parts))
    share = measured.total_s / measured.bare_s
    assert lines[-2] == f"| **all of it** | {1000 * measured.total_s:.2f} ms | {share:.2%} |"
