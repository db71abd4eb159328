"""The wheel: everything that a user needs is in it, and it runs where there is no repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ngrpo_lora.config import dump_config, load_config
from ngrpo_lora.hub.pipeline_file import pipeline_file

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ngrpo_lora"


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT))
    (path,) = folder.glob("ngrpo_lora-*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_package(wheel: Path):
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    missing = {path for path in ours - inside if "__pycache__" not in path}
    assert not missing
    assert {"ngrpo_lora/py.typed", "ngrpo_lora/config/presets/demo.yaml", "ngrpo_lora/cli/app.py"} <= inside
    pipelines = {f"ngrpo_lora/pipelines/{path.name}" for path in (ROOT / "pipelines").iterdir() if path.is_file()}
    assert pipelines == {name for name in inside if name.startswith("ngrpo_lora/pipelines/")}


def test_the_wheel_holds_nothing_else(wheel: Path):
    inside = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in inside}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ngrpo_lora"}
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_the_wheel_runs_without_the_repository(wheel: Path, tmp_path: Path):
    target, cwd = tmp_path / "target", tmp_path / "elsewhere"
    cwd.mkdir()
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    env = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}

    def run(*words: str) -> str:
        result = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert Path(run("-c", "import ngrpo_lora; print(ngrpo_lora.__file__)").strip()).is_relative_to(target)
    assert run(str(target / "bin" / "ngrpo"), "config") == dump_config(load_config())
    assert run(str(target / "bin" / "ngrpo"), "--version").startswith("ngrpo-lora ")
    whole = "from ngrpo_lora.hub.pipeline_file import *; print(sources()); print(pipeline_file('flux'), end='')"
    folder, source = run("-c", whole).split("\n", 1)
    assert Path(folder) == target / "ngrpo_lora" / "pipelines"
    assert source == pipeline_file("flux")
