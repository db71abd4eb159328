"""The Hub with and without token and network, ComfyUI around this package, and a launcher's variables."""

from __future__ import annotations

import threading
import tomllib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import ngrpo_lora
from ngrpo_lora.planning.doctor import surroundings
from ngrpo_lora.planning.doctor.findings import Finding

ROOT = Path(__file__).parents[3]


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return "hf_secret"


def answer(monkeypatch: pytest.MonkeyPatch, said: Any) -> None:
    def whoami(self: huggingface_hub.HfApi) -> Any:
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)


def test_a_token_is_not_shown_and_the_hub_not_asked_unless_wanted(token: str, monkeypatch: pytest.MonkeyPatch):
    answer(monkeypatch, AssertionError("asked"))
    (finding,) = surroundings.hub(online=False)
    assert finding.verdict == "ok"
    assert token not in finding.line


def test_the_hub_accepts_or_refuses_the_token(token: str, monkeypatch: pytest.MonkeyPatch):
    answer(monkeypatch, {"name": "ada", "auth": {"accessToken": {"role": "write"}}})
    assert [*surroundings.hub(online=True)] == [Finding("Hub", "ok", "the token is accepted (role: write)")]
    answer(monkeypatch, ConnectionError("refused"))
    (finding,) = surroundings.hub(online=True)
    assert (finding.verdict, finding.text) == ("problem", "the Hub cannot be reached (refused)")
    assert finding.remedy == "check the network, or HF_ENDPOINT"


def test_a_hub_that_does_not_answer_is_given_up(token: str, monkeypatch: pytest.MonkeyPatch):
    waiting = threading.Event()
    monkeypatch.setattr(surroundings, "WHOAMI_S", 0.05)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: waiting.wait(20))
    (finding,) = surroundings.hub(online=True)
    waiting.set()
    assert (finding.verdict, finding.text) == ("problem", "the Hub cannot be reached (no answer)")


def test_no_token_and_offline_are_notes(token: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    (finding,) = surroundings.hub(online=True)
    assert (finding.verdict, finding.text) == ("note", "no token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (finding,) = surroundings.hub(online=True)
    assert finding.verdict == "note"
    assert finding.text.startswith("HF_HUB_OFFLINE is set")


# ComfyUI -------------------------------------------------------------------------------------------------------------


def test_the_least_comfyui_is_that_of_the_registry():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert stated["tool"]["comfy"]["requires-comfyui"] == f">={surroundings.MIN_COMFYUI}"


@pytest.mark.parametrize(
    ("version", "verdict", "said"),
    [
        ("0.3.75", "ok", "0.3.75, around this package"),
        ("0.3.9", "problem", "0.3.9, around this package, is older than 0.3.75, which the nodes need"),
        ("1.0.0", "ok", "1.0.0, around this package"),
        (None, "note", "around this package, of unknown version"),
    ],
)
def test_a_comfyui_around_this_package_is_judged(
    version: str | None, verdict: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if version is not None:
        text = f'# made by a script\n__version__ = "{version}"\nraise SystemExit("is read, not run")\n'
        (tmp_path / "comfyui_version.py").write_text(text)
    file = tmp_path / "custom_nodes" / "ngrpo-lora" / "ngrpo_lora" / "__init__.py"
    monkeypatch.setattr(ngrpo_lora, "__file__", str(file))
    monkeypatch.setattr(surroundings, "find_spec", lambda name: None)
    (finding,) = surroundings.comfyui()
    assert (finding.verdict, finding.text) == (verdict, said)
    assert bool(finding.remedy) == (verdict != "ok")


def test_a_comfyui_that_can_be_imported_is_judged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(surroundings, "find_spec", lambda name: None)
    (finding,) = surroundings.comfyui()
    assert (finding.verdict, finding.text) == ("ok", "not seen from here; only the nodes need it")
    monkeypatch.undo()
    (tmp_path / "comfy_api").mkdir()
    (tmp_path / "comfy_api" / "__init__.py").write_text("raise SystemExit('is found, not run')")
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.4.0"')
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = surroundings.comfyui()
    assert (finding.verdict, finding.text) == ("ok", "0.4.0, importable")


# Launchers -----------------------------------------------------------------------------------------------------------


def test_a_stale_variable_of_a_launcher_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert [*surroundings.launcher()] == [Finding("launcher", "ok", "none started this process")]
    monkeypatch.setenv("WORLD_SIZE", "4")
    (finding,) = surroundings.launcher()
    assert finding.verdict == "problem"
    assert finding.text.startswith("the environment variable WORLD_SIZE=4 says that a launcher started this process")
    assert finding.remedy == "unset WORLD_SIZE, or start the run by accelerate launch or torchrun"
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert [*surroundings.launcher()] == [Finding("launcher", "ok", "one of several processes")]
