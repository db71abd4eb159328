"""Files of the user's at their import: their neighbours, what they change, and one message where they fail."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.guests.files import left_at_import
from ngrpo_lora.registry import resolve_function

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write("folder/mine.py", text)` -> the reference of the function `score` in it."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return f"{path}:score"

    return write


@pytest.mark.parametrize(
    "text",
    [
        "from tools import light\ndef score(): return light()",
        "import tools as t\ndef score(): return t.light()",
        "import tools\ndef score(): return tools.light()",
        "def score():\n    from tools import light\n    return light()",
        "import kit.inner\ndef score(): return kit.inner.light()",
        "from kit import inner\ndef score(): return inner.light()",
        "from kit.inner import light\ndef score(): return light()",
        "import loose.one\ndef score(): return loose.one.light()",
        "import importlib\ndef score(): return importlib.import_module('tools').light()",
        "from importlib import import_module\nkit = import_module('kit.inner')\ndef score(): return kit.light()",
        "import importlib.util as u, importlib\nassert u.find_spec('os')\n"
        "def score(): return importlib.import_module('tools').light()",
    ],
)
def test_files_in_two_folders_have_neighbours_of_their_own(text: str, write: Write):
    for folder in ("a", "b"):
        for place in ("tools", "kit/inner", "loose/one"):
            write(f"{folder}/{place}.py", f"def light(): return {folder!r}")
        write(f"{folder}/kit/__init__.py", "import tools\n")
    path, modules = [*sys.path], {*sys.modules}
    scores = [resolve_function(write(f"{folder}/mine.py", text)) for folder in ("a", "b")]
    assert [score() for score in scores] == ["a", "b"]
    assert sys.path == path
    assert not {"tools", "kit", "loose"} & ({*sys.modules} - modules)


def test_files_of_one_folder_share_a_neighbour(write: Write):
    write("counter.py", "number = [0]")
    text = "import counter\ndef score():\n    counter.number[0] += 1\n    return counter.number[0]"
    assert [resolve_function(write(f"{name}.py", text))() for name in ("one", "two")] == [1, 2]


def test_a_neighbour_does_not_stand_in_for_pythons_own(write: Write):
    write("json.py", "dumps = None")
    assert resolve_function(write("mine.py", "import json\ndef score(): return json.dumps([1])"))() == "[1]"


def test_import_module_finds_what_is_no_neighbour_as_ever(write: Write):
    text = """
import importlib, os
def score():
    found = importlib.import_module("os.path"), importlib.import_module(".path", "os")
    return found == (os.path, os.path) and importlib.reload is not None
"""
    assert resolve_function(write("mine.py", text))()


def test_what_an_import_changes_is_put_back_and_kept_for_its_calls(write: Write):
    text = """
import logging, os, signal, sys, warnings
import numpy as np, torch
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
torch.set_default_device("meta")
os.environ["OF_A_GUEST"] = "1"
os.chdir("/")
sys.argv.append("--more")
sys.stdout = None
np.seterr(all="raise")
logging.disable(logging.CRITICAL)
logging.root.handlers.clear()
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
warnings.simplefilter("error")
def score(): return 1
"""
    import logging
    import warnings

    import numpy as np

    def now() -> list[object]:
        handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
        of_torch = [torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device()]
        of_logs = [logging.root.manager.disable, [*logging.root.handlers], [*warnings.filters]]
        return [*of_torch, *handlers, *of_logs, dict(os.environ), os.getcwd(), [*sys.argv], sys.stdout, np.geterr()]

    before, reference = now(), write("rude.py", text)
    resolve_function(reference)
    assert now() == before
    changes = left_at_import(reference.removesuffix(":score"))
    assert changes["torch's default dtype"] == torch.float64
    assert changes["os.environ"]["OF_A_GUEST"] == "1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nraise OSError('no disk\\nat all')", r"mine.py, line 2: OSError: no disk\)"),
        ("x = 1\ndef score(:", r"mine.py, line 2: SyntaxError: "),
        ("import gone_for_good", r"mine.py, line 1: ModuleNotFoundError: No module named 'gone_for_good'"),
        ("import worse", r"worse.py, line 1: KeyError: 'x'\)"),
        ("raise KeyboardInterrupt", r"mine.py, line 1: KeyboardInterrupt"),
        ("raise GeneratorExit", r"mine.py, line 1: GeneratorExit"),
        ("import os\nos._exit(0)", r"ends the program when it is imported \(mine.py, line 2\); put .*__main__"),
        ("import sys\nsys.exit()", r"ends the program when it is imported \(mine.py, line 2\); put .*__main__"),
    ],
)
def test_a_failure_is_one_line_with_file_line_and_error(text: str, message: str, write: Write):
    write("worse.py", "{}['x']")
    with pytest.raises(ConfigError, match=message) as error:
        resolve_function(write("mine.py", text))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("names the file '")


def test_a_script_sees_no_arguments_and_its_usage_is_not_shown(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["ngrpo", "train", "demo"])
    text = "import argparse\np = argparse.ArgumentParser()\n{}\np.parse_args()\ndef score(): return 1"
    assert resolve_function(write("lenient.py", text.format("")))() == 1
    with pytest.raises(ConfigError, match=r"strict.py', which ends the program .*\(strict.py, line 4\); put"):
        resolve_function(write("strict.py", text.format("p.add_argument('--width', required=True)")))
    assert sys.argv == ["ngrpo", "train", "demo"]
    assert "usage" not in capsys.readouterr().err


def test_what_a_file_prints_at_its_import_is_shown(write: Write, capsys: pytest.CaptureFixture[str]):
    resolve_function(write("mine.py", "import sys\nprint('loaded', file=sys.stderr)\ndef score(): return 1"))
    assert capsys.readouterr().err == "loaded\n"
