"""What the doctor prints: one line, and nothing that its reader may not know."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ngrpo_lora.planning.doctor.findings import Finding, scrub


def test_a_finding_is_a_line_with_its_remedy():
    assert Finding("torch", "ok", "2.13.0").line == "ok       torch            2.13.0"
    assert Finding("torch", "problem", "old", "renew it").line == "problem  torch            old; renew it"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/ada/x.so: no such file", "~/x.so: no such file"),
        ("'/mnt/home/ada/x', /opt/homes/x", "'~/x', /opt/homes/x"),
        ("in /Users/ada/lib/a.py", "in ~/lib/a.py"),
        (r"C:\Users\ada\a.dll is gone", r"~\a.dll is gone"),
        ("hf_" + "aB3" * 11 + " is wrong", "<secret> is wrong"),
        ("hf_hub_download and hf_transfer", "hf_hub_download and hf_transfer"),
        ("http://ada:pass@proxy:80 refused", "http://<secret>@proxy:80 refused"),
        ("a\n  b\tc", "a b c"),
        ("x" * 400, "x" * 300),
    ],
)
def test_scrub_takes_out_what_names_somebody(text: str, left: str):
    assert scrub(text) == left


def test_scrub_knows_this_home_this_host_and_the_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/data/ada"))
    monkeypatch.setattr(socket, "gethostname", lambda: "lab-7")
    monkeypatch.setenv("MY_API_KEY", "open sesame")
    assert scrub("/data/ada/x, /data/adam/x, /srv/data/ada") == "~/x, /data/adam/x, /srv/data/ada"
    assert scrub("lab-7: lab-70 and lab-7.example") == "<host>: lab-70 and <host>.example"
    assert scrub("it says open sesame") == "it says <secret>"


def test_all_of_a_finding_is_scrubbed():
    found = Finding("x", "note", "/home/ada/a", "see /home/ada/b").scrubbed()
    assert found == Finding("x", "note", "~/a", "see ~/b")
