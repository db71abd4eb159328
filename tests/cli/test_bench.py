"""`ngrpo bench`: what each command measures, and with which settings unless told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import refuse, run

from ngrpo_lora.bench.gradient import Asked
from ngrpo_lora.bench.varying import all_settings
from ngrpo_lora.config import load_config


def test_the_solvers_errors_are_a_table_for_each_shift():
    lines = run("bench", "solver", "--steps", 8, "--steps", 4, "--shift", 2)
    assert "shift 2" in lines
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 4", "| 8"]


@pytest.mark.parametrize(
    ("words", "table", "arguments"),
    [
        (["solver"], "solver.solver_table", [[4, 8, 16, 32, 64, 128, 256, 512, 1024], [1.0, 3.0]]),
        (["pipeline"], "pipeline.overhead_table", [[1, 4], [64], [8, 28], 10]),
        (
            ["pipeline", "--widen", "2", "--size", "32", "--repeats", "3"],
            "pipeline.overhead_table",
            [[2], [32], [8, 28], 3],
        ),
        (["gpu", "flux"], "training.gpu_table", [load_config("flux"), [720], [1, 2, 4], 3]),
        (["gpu", "--size", "32", "--batch", "2"], "training.gpu_table", [load_config(), [32], [2], 3]),
        (["overhead", "flux", "seed=3"], "training.overhead_table", [load_config("flux", ["seed=3"]), 5]),
        (["gradient", "seed=3"], "gradient.gradient_table", [all_settings(None, ["seed=3"], []), Asked(), None]),
        (
            *(["gradient", "--vary", "seed=1,2", "--gradients", "3", "--prompts", "8", "--step", "2", "--step", "4"],),
            "gradient.gradient_table",
            [all_settings(None, [], ["seed=1,2"]), Asked(3, 8, (2.0, 4.0)), None],
        ),
        (["scaling", "seed=3"], "scaling.scaling_table", [load_config(None, ["seed=3"]), [], 3, None]),
        (
            ["scaling", "flux", "--processes", "1, 2", "--repeats", "5", "--output", "times.json"],
            "scaling.scaling_table",
            [load_config("flux"), [1, 2], 5, Path("times.json")],
        ),
    ],
)
def test_every_table_is_measured_with_what_is_asked_for(
    words: list[str], table: str, arguments: list[Any], monkeypatch: pytest.MonkeyPatch
):
    def measure(*given: Any) -> None:
        *asked, tell = given
        assert asked == arguments
        tell("| measured |")

    monkeypatch.setattr(f"ngrpo_lora.bench.{table}", measure)
    for others in ("bare.bare_table", "keeping.keeping_table"):
        monkeypatch.setattr(f"ngrpo_lora.bench.{others}", measure)
    also = ["", "| measured |"] * 2 if words[0] == "overhead" else []
    assert run("bench", *words) == ["| measured |", *also]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gradient", "--vary", "rollout.nun_steps=4,8"], "unknown key rollout.nun_steps"),
        (["gradient", "--vary", "rollout.num_steps=4,0"], "rollout.num_steps must be at least 2, got 0"),
        (["gradient", "--vary", "rollout.num_steps"], "--vary must look like key=value,value"),
        (["gradient", "--gradients", "1"], "--gradients must be at least 2"),
        (["gradient", "--prompts", "3"], "--prompts must be at least 4"),
        (["gradient", "--step", "-1"], "--step must be a positive number of AdamW steps, got -1"),
        (["gradient", "resume=latest"], "resume must be null for a bench"),
        (["gradient", "--output", "/dev/null/rows.json"], "--output must be"),
        (["scaling", "rollout.num_steps=0"], "rollout.num_steps must be at least 2, got 0"),
        (["scaling", "--processes", "1"], "--processes must be two or more different numbers"),
        (["scaling", "--processes", "1,9"], "from 1 to rollout.prompts_per_iteration (8), got 1,9"),
        (["scaling", "--processes", "1,two"], "--processes must be numbers with commas between them, got '1,two'"),
        (["scaling", "--output", "/dev/null/times.json"], "--output must be a writable file"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_loads(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    for module in ("gradient", "scaling"):
        monkeypatch.setattr(f"ngrpo_lora.bench.{module}.prepare", None)
    assert message in refuse("bench", *words)


def test_a_report_is_made_of_all_parts_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ngrpo_lora.bench.gpu.parts import make_parts

    def make_report(parts: Any, folder: Path, machine: str, minutes: float, tell: Any) -> bool:
        assert (parts, folder, minutes) == (make_parts("cpu"), tmp_path / "new", 3.5)
        assert machine.startswith("PyTorch ")
        return False

    monkeypatch.setattr("ngrpo_lora.bench.gpu.running.make_report", make_report)
    words = ["bench", "report", "--device", "cpu", "--minutes", 3.5, "--output-dir", tmp_path / "new"]
    (line,) = run(*words)
    assert (
        line == f"{tmp_path / 'new' / 'report.md'}; some rows are not measured yet: the same command goes on with them"
    )


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_a_report_without_minutes_or_a_place_is_refused(minutes: str, tmp_path: Path):
    assert "--minutes must be more than 0, got" in refuse("bench", "report", "--minutes", minutes)
    (tmp_path / "file").write_text("")
    message = refuse("bench", "report", "--device", "cpu", "--output-dir", tmp_path / "file" / "report")
    assert "--output-dir must be a writable folder" in message
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "sizes.json").write_text("{}")
    message = refuse("bench", "report", "--device", "cpu", "--output-dir", tmp_path)
    assert "sizes.json' must be a file of `ngrpo bench report`" in message
