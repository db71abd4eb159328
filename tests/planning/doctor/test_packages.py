"""Verdicts on Python and on packages: absent, broken, too old, untested, and as they must be."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ngrpo_lora.planning.doctor import packages
from ngrpo_lora.planning.doctor.findings import Finding

LOCK = Path(__file__).parents[3] / "requirements.lock"


def test_the_known_good_versions_are_those_of_the_lock():
    locked = dict(line.split("==") for line in LOCK.read_text().split() if "==" in line)
    assert {name: locked[name] for name in packages.KNOWN_GOOD} == packages.KNOWN_GOOD


@pytest.mark.parametrize("name", packages.KNOWN_GOOD)
def test_the_packages_that_run_this_test_are_well(name: str):
    (finding,) = packages.package(name)
    assert finding.verdict == ("ok" if finding.text.partition("+")[0] == packages.KNOWN_GOOD[name] else "note")
    assert finding.text.startswith(metadata.version(name))


@pytest.mark.parametrize(
    ("found", "verdict", "said"),
    [
        ("2.13.0", "ok", "2.13.0"),
        ("2.13.0+cu130", "ok", "2.13.0+cu130"),
        ("2.6", "note", "2.6, tested is 2.13.0"),
        ("2.14.0.dev20261101", "note", "2.14.0.dev20261101, tested is 2.13.0"),
        ("2.5.1", "problem", "2.5.1 is older than 2.6"),
        ("1.13.1+cu117", "problem", "1.13.1+cu117 is older than 2.6"),
    ],
)
def test_a_version_is_judged(found: str, verdict: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "requires", lambda name: ["numpy>=1.26", "torch!=2.7,>=2.6"])
    finding = packages.judged("torch", found)
    assert (finding.verdict, finding.text) == (verdict, said)
    assert bool(finding.remedy) == (verdict != "ok")


def test_the_least_version_is_found_under_both_spellings_and_in_extras(monkeypatch: pytest.MonkeyPatch):
    needed = ["huggingface-hub>=1.10", "bitsandbytes>=0.48; extra == '8bit'", "peft"]
    monkeypatch.setattr(packages, "requires", lambda name: needed)
    assert packages.minimum("huggingface_hub") == "1.10"
    assert packages.minimum("bitsandbytes") == "0.48"
    assert packages.minimum("peft") is None


@pytest.mark.parametrize(
    ("code", "said", "remedy"),
    [
        (
            "raise RuntimeError('no symbol x\\nin y')",
            "RuntimeError: no symbol x",
            "pip install --force-reinstall broken==1.0",
        ),
        (
            "try: {}['torchvision::nms']\nexcept KeyError as error: raise ImportError('lazy') from error",
            "KeyError: 'torchvision::nms'",
            "reinstall what this names, then try again",
        ),
        ("raise SystemExit('no licence')", "SystemExit: no licence", "pip install --force-reinstall broken==1.0"),
    ],
)
def test_a_package_that_is_installed_but_broken_is_a_problem_with_the_first_line_of_its_cause(
    code: str, said: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(packages.KNOWN_GOOD, "broken", "1.0")
    monkeypatch.setattr(packages, "version", lambda name: "1.0")
    text = f"1.0 is installed but does not import: {said}"
    assert [*packages.package("broken")] == [Finding("broken", "problem", text, remedy)]


def test_an_absent_package_is_a_problem_where_it_is_needed(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "version", absent)
    monkeypatch.setattr(packages, "requires", absent)
    (needed,), (optional,), (own,) = packages.package("peft"), packages.package("bitsandbytes"), packages.this_package()
    assert (needed.verdict, needed.remedy) == ("problem", "pip install peft==0.21.2")
    assert (optional.verdict, optional.remedy) == ("note", "pip install bitsandbytes")
    assert own.verdict == "note"
    assert packages.judged("torch", "1.0").verdict == "note"  # the least version is not known


def test_python(monkeypatch: pytest.MonkeyPatch):
    (finding,) = packages.python()
    assert finding.verdict == "ok"
    assert re.fullmatch(r"3\.\d+\.\d+", finding.text)
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    assert [*packages.python()] == [
        Finding("Python", "problem", "3.10.4 is older than 3.11", "make an environment with 3.11")
    ]
