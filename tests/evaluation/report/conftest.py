"""Runs to report on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_runs

from ngrpo_lora.evaluation.report.record import Record


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Record]:
    """`write_run("name", ...)`: a run in a folder of this name; see `report_runs.write_run`."""

    def write(name: str = "run", **settings: Any) -> Record:
        return report_runs.write_run(tmp_path / name, **settings)

    return write
