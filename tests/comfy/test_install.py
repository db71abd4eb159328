"""The ways in which the pack gets into ComfyUI, each in a server of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from comfy_client import REPOSITORY, Comfy, start
from graphs import drawing

HIDE_INSTALLED = """
import os, sys
sys.path[:] = [path for path in sys.path if not os.path.isdir(os.path.join(path, "ngrpo_lora"))]
"""


def clone(target: Path) -> Path:
    """What `git clone` gives, with what is not committed yet."""
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    return shutil.copytree(REPOSITORY, target, symlinks=True, ignore=left_out)


@pytest.fixture
def not_installed(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python does not find an installed ngrpo_lora."""
    (folder := tmp_path / "site").mkdir()
    (folder / "sitecustomize.py").write_text(HIDE_INSTALLED)
    environment = {"PYTHONPATH": str(folder)}
    asked = subprocess.run(
        [sys.executable, "-c", "import ngrpo_lora"], cwd=folder, env=os.environ | environment, capture_output=True
    )
    assert b"ModuleNotFoundError: No module named 'ngrpo_lora'" in asked.stderr
    return environment


def check(comfy: Comfy, *names: str) -> None:
    """The nodes draw; templates and translations of each custom node are there, and so are help pages."""
    try:
        assert "(IMPORT FAILED)" not in comfy.log.read_text(errors="replace")
        assert comfy.run(drawing(steps=2)).status == "success"
        templates = comfy.get("/workflow_templates")
        assert set(templates) == set(names)
        assert comfy.get("/i18n")["zh"]["nodeDefs"]["NGRPO_LoadEmbedded"]["display_name"]
        graphs = {path.stem for path in (REPOSITORY / "workflows").glob("*.json")}
        for name in names:
            assert set(templates[name]) == graphs
            for graph in graphs:
                assert comfy.get(f"/api/workflow_templates/{name}/{graph}.json")["nodes"]
            assert comfy.fetch(f"/extensions/{name}/docs/NGRPO_LoadEmbedded.md").startswith(b"# ")
        if len(names) == 1:
            assert comfy.get("/object_info/NGRPO_LoadEmbedded")["NGRPO_LoadEmbedded"]["python_module"] == (
                f"custom_nodes.{names[0]}"
            )
    finally:
        comfy.stop()


def test_a_clone_that_is_not_installed(tmp_path: Path, not_installed: dict[str, str]):
    clone(tmp_path / "custom_nodes" / "ngrpo-lora")
    check(start(tmp_path, link=False, environment=not_installed), "ngrpo-lora")


def test_the_nodes_folder_linked(tmp_path: Path):
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "neighbor.grpo").symlink_to(REPOSITORY / "comfy_nodes", target_is_directory=True)
    check(start(tmp_path, link=False), "neighbor.grpo")


def test_both_at_once(tmp_path: Path, not_installed: dict[str, str]):
    clone(tmp_path / "custom_nodes" / "ngrpo-lora")
    (tmp_path / "custom_nodes" / "ngrpo").symlink_to(REPOSITORY / "comfy_nodes", target_is_directory=True)
    check(start(tmp_path, link=False, environment=not_installed), "ngrpo-lora", "ngrpo")


def test_the_root_does_nothing_outside_comfyui():
    code = f"import importlib; print(dir(importlib.import_module({REPOSITORY.name!r})))"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=REPOSITORY.parent, capture_output=True, text=True, check=True).stdout
    assert "__file__" in shown
    assert "comfy_entrypoint" not in shown


def test_the_managers_requirements_are_the_packages_but_torch_and_those_of_the_voting_page():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    own = [dependency for dependency in project["dependencies"] if not dependency.startswith("torch")]
    assert wanted == [*own, *project["optional-dependencies"]["server"]]


def test_the_registry_takes_it():
    command = [str(Path(sys.executable).with_name("comfy")), "--skip-prompt", "node", "validate"]
    environment = os.environ | {"DO_NOT_TRACK": "1"}
    found = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    said = found.stdout + found.stderr
    assert "All validation checks passed" in said, said
