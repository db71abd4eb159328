"""`ngrpo bench`: what each command measures, and with which settings unless told."""

from __future__ import annotations

from typing import Any

import pytest
from commands import run

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
    assert run("bench", *words) == ["| measured |"]
