"""`ngrpo doctor`: its lines, its exit status, and an environment that is broken."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.planning.doctor import examination
from ngrpo_lora.planning.doctor.findings import Finding

ROOT = Path(__file__).parents[2]


def replace_checks(found: list[Finding], monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Replace all checks by one with these findings; the list fills with the options `online` and `quick`."""
    asked: list[tuple[bool, bool]] = []

    def look() -> Iterator[Finding]:
        yield from found

    def checks(online: bool, quick: bool) -> list[examination.Check]:
        asked.append((online, quick))
        return [examination.Check("x", look)]

    monkeypatch.setattr(examination, "checks", checks)
    return asked


def test_lines_a_verdict_and_a_block(monkeypatch: pytest.MonkeyPatch):
    asked = replace_checks([Finding("a", "ok", "x"), Finding("b", "note", "y", "do y")], monkeypatch)
    lines = run("doctor", "--online", "--quick")
    assert lines[:4] == [
        "ok       a                x",
        "note     b                y; do y",
        "",
        "no problem; for a bug report, paste this:",
    ]
    assert (lines[5], lines[7:]) == ("```", ["a: x", "b: y [note]", "```"])
    assert asked == [(True, True)]


def test_a_problem_is_exit_status_1(monkeypatch: pytest.MonkeyPatch):
    asked = replace_checks([Finding("a", "ok", "x"), Finding("b", "problem", "y", "do y")], monkeypatch)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "\none problem; for a bug report" in result.stdout
    assert asked == [(False, False)]
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    values = json.loads(result.stdout)
    assert values["problems"] == 1
    assert values["findings"][1] == {"check": "b", "verdict": "problem", "text": "y", "remedy": "do y"}


def doctor(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ngrpo_lora", "doctor", *words]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400
    )


def test_this_machine_in_truth():
    token = "hf_" + "aB3" * 11
    result = doctor("--quick", "--json", HF_TOKEN=token, HF_HUB_OFFLINE="0", WORLD_SIZE="3")
    values = json.loads(result.stdout)
    found = {finding["check"]: finding for finding in values["findings"]}
    assert all(finding["remedy"] for finding in found.values() if finding["verdict"] != "ok")
    assert found["launcher"]["verdict"] == "problem"
    assert result.returncode == 1
    assert found["torch"]["verdict"] in ("ok", "note")
    assert found["Hub"]["text"].startswith("a token is there")
    assert {"CUDA", "CPU", "memory", "disk, here", "disk, Hub cache", "ComfyUI", "8-bit"} < set(found)
    assert "embedded model" not in found
    for secret in (token, str(Path.home()) + os.sep, socket.gethostname()):
        assert secret not in result.stdout


def test_a_torch_that_does_not_import_does_not_end_it(tmp_path: Path):
    (tmp_path / "torch").mkdir()
    text = f"raise OSError('{tmp_path}/libc10.so: cannot open\\nmore')"
    (tmp_path / "torch" / "__init__.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = doctor("--json", PYTHONPATH=path)
    assert "Traceback" not in result.stderr
    found = {finding["check"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert result.returncode == 1
    assert found["torch"]["verdict"] == "problem"
    assert "does not import: OSError: " in found["torch"]["text"]
    assert found["torch"]["text"].endswith("libc10.so: cannot open")
    assert found["CUDA"]["text"] == "not looked at without torch"
    assert found["embedded model"]["verdict"] == "note"
    assert found["memory"]["verdict"] == "ok"
