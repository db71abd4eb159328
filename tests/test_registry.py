"""The file name is the registry."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from ngrpo_lora import registry
from ngrpo_lora.errors import ConfigError, UserError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package `zoo` with files lion, needs_gone and _private."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "lion.py").write_text("NAME = 'lion'\n\ndef roar():\n    return 'loud'\n\ndef _sleep(): ...\n")
    (folder / "needs_gone.py").write_text("import a_package_that_is_gone\n")
    (folder / "_private.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import zoo

    yield zoo
    for name in [name for name in sys.modules if name.split(".")[0] == "zoo"]:
        del sys.modules[name]


def test_a_file_is_found_by_its_name_alone(package: ModuleType):
    assert registry.names(package.__name__) == ["lion", "needs_gone"]
    assert registry.load(package.__name__, "lion").NAME == "lion"


def test_names_imports_nothing(package: ModuleType):
    registry.names(package.__name__)
    assert "zoo.lion" not in sys.modules


def test_a_new_file_needs_no_registration(package: ModuleType, tmp_path: Path):
    (tmp_path / "zoo" / "tiger.py").write_text("NAME = 'tiger'\n")
    assert registry.load(package.__name__, "tiger").NAME == "tiger"


def test_a_dotted_name_leads_elsewhere(package: ModuleType):
    assert registry.load(package.__name__, "zoo.lion").NAME == "lion"


@pytest.mark.parametrize("name", ["zoo.unicorn", "no_zoo.lion", ".lion", ".."])
def test_a_dotted_name_that_leads_nowhere_is_refused(package: ModuleType, name: str):
    with pytest.raises(ConfigError, match="which Python cannot find; install it or correct the name"):
        registry.load(package.__name__, name)


@pytest.mark.parametrize("name", ["lino", "_private", "", "Lion"])
def test_an_unknown_name_lists_the_known_ones(package: ModuleType, name: str):
    with pytest.raises(ConfigError, match="must be one of lion, needs_gone") as error:
        registry.load(package.__name__, name)
    assert repr(name) in str(error.value)


def test_the_nearest_name_is_suggested(package: ModuleType):
    with pytest.raises(ValueError, match=r"did you mean lion\?"):
        registry.load(package.__name__, "lino")


def test_a_missing_dependency_keeps_its_own_error(package: ModuleType):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_gone"):
        registry.load(package.__name__, "needs_gone")


def test_a_function_is_found_by_module_and_by_file(package: ModuleType):
    assert registry.resolve_function("zoo.lion:roar")() == "loud"
    assert registry.resolve_function("zoo/lion.py:roar")() == "loud"


def test_a_file_is_executed_once_and_two_files_of_one_name_stay_apart(package: ModuleType, tmp_path: Path):
    (tmp_path / "lion.py").write_text("def roar():\n    return 'quiet'\n")
    first = registry.resolve_function("zoo/lion.py:roar")
    assert registry.resolve_function("./zoo/lion.py:roar") is first
    assert registry.resolve_function("lion.py:roar")() == "quiet"


@pytest.mark.parametrize(
    ("reference", "part"),
    [
        ("zoo.lion", "must look like package.module:function or file.py:function"),
        (":roar", "must look like"),
        ("zoo.lion:1", "must look like"),
        ("zoo.tiger:roar", "module 'zoo.tiger', which Python cannot find"),
        ("nowhere.at.all:roar", "which Python cannot find"),
        ("tiger.py:roar", "file 'tiger.py', which does not exist"),
        ("zoo.lion:raor", "did you mean roar?"),
        ("zoo.lion:NAME", "names no function of zoo.lion, got 'NAME'"),
    ],
)
def test_a_bad_reference_is_refused(package: ModuleType, reference: str, part: str):
    with pytest.raises(UserError) as error:
        registry.resolve_function(reference)
    assert part in str(error.value)


def test_a_file_that_fails_is_tried_again(package: ModuleType, tmp_path: Path):
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('first')\n")
    with pytest.raises(ConfigError, match=r"fails when it is imported \(broken.py, line 1: RuntimeError: first\)"):
        registry.resolve_function("broken.py:score")
    path.write_text("def score():\n    return 1.0\n")
    assert registry.resolve_function("broken.py:score")() == 1.0
