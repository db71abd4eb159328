"""The checks as a whole: a failing one does not end the others, and the block for a bug report."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from ngrpo_lora.planning.doctor.examination import Check, checks, examine, report, system
from ngrpo_lora.planning.doctor.findings import Finding


def well() -> Iterator[Finding]:
    print("a package prints this")  # noqa: T201
    yield Finding("well", "ok", "at /home/ada/x")


def failing() -> Iterator[Finding]:
    yield Finding("first half", "ok", "seen")
    raise RuntimeError("no such\nthing")


def test_a_check_that_fails_is_a_problem_and_the_next_one_follows(capsys: pytest.CaptureFixture[str]):
    assert [*examine([Check("failing", failing), Check("well", well)])] == [
        Finding("first half", "ok", "seen"),
        Finding("failing", "problem", "the check itself failed: RuntimeError: no such", "report it"),
        Finding("well", "ok", "at ~/x"),
    ]
    assert capsys.readouterr().out == ""


def test_a_check_is_left_out_where_its_package_was_not_imported():
    (finding,) = examine([Check("well", well, ("torch", "no_such_package"))])
    assert finding == Finding("well", "note", "not looked at without no_such_package", "see the lines above")


def test_the_embedded_model_comes_last_or_not_at_all():
    assert checks()[-1].name == "embedded model"
    assert [check.name for check in checks(quick=True)] == [check.name for check in checks()[:-1]]


def test_the_report_is_a_fenced_block_without_remedies():
    found = [Finding("a", "ok", "x"), Finding("b", "note", "y", "do y"), Finding("c", "problem", "z", "do z")]
    head, *lines = report(found).splitlines()[1:-1]
    assert report(found).startswith("```\n")
    assert report(found).endswith("\n```")
    assert lines == ["a: x", "b: y [note]", "c: z [problem]"]
    assert head.startswith(f"ngrpo-lora {system()['ngrpo_lora']}, Python {platform.python_version()}, ")
