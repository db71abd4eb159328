"""Paths: `~` and variables of the environment stand for what a shell would put there."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusing import message

from ngrpo_lora import registry
from ngrpo_lora.config import load_config
from ngrpo_lora.config.paths import expanded, expanded_source, from_anywhere


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    monkeypatch.setenv("RUN", "a$b")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("GONE", raising=False)


@pytest.mark.parametrize(
    ("path", "result"),
    [
        *(("~", "/home/me"), ("~/r", "/home/me/r"), ("$HOME/r", "/home/me/r"), ("runs/${RUN}/x$RUN", "runs/a$b/xa$b")),
        *(("r/~", "r/~"), ("a~b", "a~b"), ("$5", "$5"), ("a$", "a$"), ("", "")),
    ],
)
def test_home_and_variables(path: str, result: str):
    assert expanded(path) == result


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("$GONE/x", r"must not name a variable that is not set, got '\$GONE/x'; set GONE"),
        ("x/${EMPTY}", "set EMPTY"),
        ("${}", "not set"),
        ("~no such user/x", "unknown user.*a folder here is ./~no such user/x"),
        ("x" * 256, "at most 255 bytes"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path: str, problem: str):
    with pytest.raises(ValueError, match=problem):
        expanded(path)


def test_a_source_keeps_its_kind_and_its_column():
    assert expanded_source("~/a.csv#$GONE") == "/home/me/a.csv#$GONE"
    assert expanded_source("hf:~/d?split=a#b") == "hf:/home/me/d?split=a#b"
    assert expanded_source("world:train/color") == "world:train/color"


@pytest.mark.parametrize(
    "key",
    ["output_dir", "resume", "lora.init_from", "model.path", "prompts.train", "prompts.held_out", "hub.commit_message"],
)
def test_every_path_of_the_configuration_is_expanded_and_no_other_text(key: str):
    value = load_config(None, [f"{key}=~/x"])
    for part in key.split("."):
        value = getattr(value, part)
    assert value == ("~/x" if key == "hub.commit_message" else "/home/me/x")


def test_functions_and_networks_are_at_home_too():
    config = load_config(
        None,
        [
            "rewards=[~/r.py:f, {name: aesthetic, path: ~/p, processor: ~/q, head: $HOME/h}]",
            "evaluation.measures=~/m.py:f",
            "evaluation.strict=~/s.py:f",
            "prompts.train={~/a.txt: 2}",
        ],
    )
    first, second = config.rewards.train
    assert first.name == "/home/me/r.py:f"
    assert second.model_dump(include={"path", "processor", "head"}) == {
        "path": "/home/me/p",
        "processor": "/home/me/q",
        "head": "/home/me/h",
    }
    assert (config.evaluation.measures, config.evaluation.strict) == (("/home/me/m.py:f",), "/home/me/s.py:f")
    assert config.prompts.train == {"/home/me/a.txt": 2}


def test_a_model_in_a_folder_is_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "embedded").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config(None, ["model.path=owner/name"]).model.path == str(tmp_path / "owner" / "name")
    assert load_config(None, ["model.path=owner/other"]).model.path == "owner/other"
    assert load_config(None, ["model.path=embedded"]).model.path == "embedded"
    monkeypatch.setattr(registry, "allow_modules", False)
    assert from_anywhere("owner/name") == "owner/name"


def test_a_configuration_is_at_home_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "run.yaml").write_text("extends: ~/base.yaml\n")
    (tmp_path / "base.yaml").write_text("seed: 3\noutput_dir: ~/r\n")
    config = load_config("~/run.yaml")
    assert (config.seed, config.output_dir) == (3, str(tmp_path / "r"))


def test_a_variable_that_is_not_set_is_refused_with_its_key():
    assert message("output_dir=$GONE/r") == (
        "output_dir must not name a variable that is not set, got '$GONE/r'; set GONE, or write out what it stands for"
    )


def test_a_graph_of_a_stranger_reads_no_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "allow_modules", False)
    assert expanded("~/$HOME") == "~/$HOME"
