"""A report is made part by part: what is complete stays, what fails is a row, and what does not fit is not started."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ngrpo_lora.bench.gpu import running
from ngrpo_lora.bench.gpu.parts import Kind, Part, Row, make_parts
from ngrpo_lora.bench.gpu.results import opened_result, read_result, waiting, write_result
from ngrpo_lora.bench.gpu.running import Budget, make_report
from ngrpo_lora.config import RunConfig, load_config
from ngrpo_lora.errors import ConfigError, UserError

MACHINE = "this machine"


def part(name: str, *rows: Row, kind: Kind = "optimizer", allotted_s: float = 30) -> Part:
    return Part(name, name.title(), kind, allotted_s, rows)


def quiet(line: str) -> None:
    """Tell nobody."""


@pytest.fixture
def config() -> RunConfig:
    return load_config(None, ["model.device=cpu", "lora.rank=4"])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The rows of every part that would be measured; none is."""
    found: dict[str, list[str]] = {}

    def measure(path: Path, granted_s: float) -> None:
        found[path.stem] = [row["label"] for row in waiting(read_result(path))]

    monkeypatch.setattr(running, "measure", measure)
    return found


def states(folder: Path, name: str) -> list[str]:
    return [row["state"] for row in read_result(folder / "parts" / f"{name}.json")["rows"]]


def test_each_part_is_measured_by_a_process_and_leaves_its_figures(config: RunConfig, tmp_path: Path):
    """A quantised base cannot be had on a CPU, and what comes after it is measured all the same."""
    nf4 = load_config(None, ["model.device=cpu", "model.quantization=nf4", "rollout.merge_adapter=false"])
    parts = [part("pace", Row("nf4", nf4), kind="pace"), part("steps", Row("adamw", config))]
    assert make_report(parts, tmp_path, MACHINE, 10, quiet)
    assert (states(tmp_path, "pace"), states(tmp_path, "steps")) == (["left out"], ["measured"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert [one["part"] for one in report["parts"]] == ["pace", "steps"]
    assert report["parts"][1]["rows"][0]["found"]["step_s"] > 0
    page = (tmp_path / "report.md").read_text()
    assert "| nf4 | left out: model.quantization=nf4 needs " in page
    for name in ("pace", "steps"):
        assert (tmp_path / "parts" / f"{name}.md").read_text().strip() in page


def finished(folder: Path, parts: list[Part], state: str = "measured") -> dict[str, bytes]:
    """Files of parts whose rows have all come to a state."""
    files: dict[str, bytes] = {}
    for one in parts:
        path = folder / "parts" / f"{one.name}.json"
        result = opened_result(one, path, MACHINE)
        for row in result["rows"]:
            row["state"], row["found"] = state, {"elements": 1, "step_s": 1.0, "state_gib": None}
            row["found"] |= {"plan_state_gib": 0.0, "plan_paged_gib": 0.0}
        write_result(path, result)
        files[one.name] = path.read_bytes()
    return files


@pytest.mark.parametrize("state", ["measured", "left out", "out of memory"])
def test_what_is_complete_is_not_measured_again(
    state: str, config: RunConfig, tmp_path: Path, started: dict[str, list[str]]
):
    parts = [part("steps", Row("first", config)), part("more", Row("first", config))]
    before = finished(tmp_path, parts, state)
    assert make_report(parts, tmp_path, MACHINE, 10, quiet)
    assert started == {}
    assert {one.name: (tmp_path / "parts" / f"{one.name}.json").read_bytes() for one in parts} == before


@pytest.mark.parametrize("state", ["failed", "stopped", "waiting"])
def test_what_was_not_measured_is_tried_again(
    state: str, config: RunConfig, tmp_path: Path, started: dict[str, list[str]]
):
    parts = [part("steps", Row("first", config))]
    finished(tmp_path, parts, state)
    make_report(parts, tmp_path, MACHINE, 10, quiet)
    assert started == {"steps": ["first"]}


@pytest.mark.parametrize("lost", ["label", "config", "reason", "found", "state"])
def test_a_file_that_has_lost_something_is_refused(lost: str, config: RunConfig, tmp_path: Path):
    parts = [part("steps", Row("first", config))]
    finished(tmp_path, parts)
    path = tmp_path / "parts" / "steps.json"
    result = json.loads(path.read_text())
    del result["rows"][0][lost]
    for damaged in (result, {"rows": [3]}, {"rows": [{"state": "done"}]}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(ConfigError, match=r"steps.json' must be a file of `ngrpo bench report`, and is none; give"):
            make_report(parts, tmp_path, MACHINE, 10, quiet)


def test_two_commands_do_not_share_a_folder(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = [part("steps", Row("first", config))]

    def again(path: Path, granted_s: float) -> None:
        with pytest.raises(UserError, match=r"is in use .*wait for it or end it, or give another"):
            make_report(parts, tmp_path, MACHINE, 10, quiet)

    monkeypatch.setattr(running, "measure", again)
    make_report(parts, tmp_path, MACHINE, 10, quiet)


def test_other_settings_another_machine_and_another_version_are_measured_anew(
    config: RunConfig, tmp_path: Path, started: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
):
    def again(*rows: Row, machine: str = MACHINE) -> list[str]:
        started.clear()
        finished(tmp_path, [part("steps", Row("first", config), Row("second", config))])
        make_report([part("steps", *rows)], tmp_path, machine, 10, quiet)
        return started.get("steps", [])

    kept = Row("second", config)
    assert again(Row("first", config.model_copy(update={"seed": 7})), kept) == ["first"]
    assert again(Row("first", config), kept, Row("third", config)) == ["third"]
    assert again(Row("first", config), kept, machine="another machine") == ["first", "second"]
    finished(tmp_path, [part("steps", kept)])
    monkeypatch.setattr("ngrpo_lora.bench.gpu.results.code_version", lambda: "9.0")
    make_report([part("steps", kept)], tmp_path, MACHINE, 10, quiet)
    assert started["steps"] == ["second"]


def scripted(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let processes run a script in place of the measuring one; `path` is the part's file."""
    real = subprocess.Popen

    def start(words: list[str], **more: Any) -> Any:
        return real([sys.executable, "-c", HEAD + script, words[-1]], **more)

    monkeypatch.setattr(running.subprocess, "Popen", start)


HEAD = """
import os, sys, time
from pathlib import Path
from ngrpo_lora.bench.gpu.results import *
path = Path(sys.argv[1])
"""
CRASHES_IN_THE_SECOND = """
result = read_result(path)
for row in waiting(result):
    if row["label"] == "second":
        print("an illegal memory access", flush=True)
        os.abort()
    row["state"] = "left out"
    write_result(path, result)
"""


def test_a_process_that_crashes_fails_one_row_and_the_others_are_measured(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scripted(monkeypatch, CRASHES_IN_THE_SECOND)
    parts = [part("steps", *(Row(label, config) for label in ("first", "second", "third")))]
    assert make_report(parts, tmp_path, MACHINE, 10, quiet)
    assert states(tmp_path, "steps") == ["left out", "failed", "left out"]
    assert "| second | failed: exit status -6, an illegal memory access |" in (tmp_path / "report.md").read_text()


def test_a_part_whose_time_is_over_is_ended_and_says_so(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scripted(monkeypatch, "time.sleep(600)")
    path = tmp_path / "steps.json"
    write_result(path, opened_result(part("steps", Row("first", config), Row("second", config)), path, MACHINE))
    start = time.monotonic()
    running.measure(path, 1.0)
    assert time.monotonic() - start < 60
    rows = read_result(path)["rows"]
    assert [(row["state"], row["reason"]) for row in rows] == [("stopped", "the part's 1 s were over")] * 2


def test_what_does_not_fit_is_named_and_what_fits_after_it_is_measured(
    config: RunConfig, tmp_path: Path, started: dict[str, list[str]]
):
    sizes = {"first": 20.0, "large": 100.0, "last": 30.0}
    parts = [part(name, Row("row", config), allotted_s=seconds) for name, seconds in sizes.items()]
    told: list[str] = []
    assert not make_report(parts, tmp_path, MACHINE, 1, told.append)
    assert [*started] == ["first", "last"]
    assert any(line.startswith("Large: not started; 100 s are allotted") for line in told)
    assert "| row | not measured yet |" in (tmp_path / "parts" / "large.md").read_text()


def test_a_part_gets_what_is_left_but_for_what_later_parts_need():
    parts = [part(name, allotted_s=seconds) for name, seconds in (("a", 10.0), ("b", 50.0), ("c", 20.0))]
    assert Budget(100).granted_s(parts) == pytest.approx(30, abs=1)
    assert Budget(35).granted_s(parts) == pytest.approx(15, abs=1)  # b does not fit, c does
    assert Budget(9).granted_s(parts) == 0


def test_all_parts_but_the_last_fit_into_the_default_budget():
    *most, last = make_parts("cuda")
    assert sum(one.allotted_s for one in most) <= 12 * 60
    assert last.name == "quantised-sizes"
