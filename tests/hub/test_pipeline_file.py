"""The pipelines as one file each, for repositories of the Hub."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import find_pipeline_class, get_relative_imports

from ngrpo_lora import registry
from ngrpo_lora.hub.pipeline_file import (
    FILES,
    SCHEDULER,
    SCHEDULER_CLASS,
    has_pipeline,
    pipeline_file,
    scheduler_file,
    sources,
)
from ngrpo_lora.models._base import BaseFamily

FAMILIES = ["flux", "flux2_klein", "qwen_image", "sd3", "z_image"]


def load(path: Path, source: str) -> ModuleType:
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defined(source: str) -> list[str]:
    """Names that a module's own statements give, imports left out."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def test_families_with_a_pipeline_are_those_of_the_folder():
    assert [family for family in registry.names(registry.MODELS) if has_pipeline(family)] == FAMILIES


def test_every_model_that_edits_pictures_has_a_pipeline_where_its_family_has_one():
    families = [vars(registry.load(registry.MODELS, family)).values() for family in FAMILIES]
    kinds = {kind for family in families for kind in family if isinstance(kind, type) and issubclass(kind, BaseFamily)}
    pictures = [kind for kind in kinds if kind.edits and kind.num_frames == 1]  # and no video's first frame
    assert {kind.pipeline_class for kind in pictures if hasattr(kind, "pipeline_class")} == FILES.keys()
    assert all(has_pipeline(name) for name in FILES.values())


@pytest.mark.parametrize("family", sorted({*FAMILIES, *FILES.values()}))
def test_one_file_has_all_that_the_pipeline_needs(family: str, tmp_path: Path):
    source = pipeline_file(family)
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    for node in imports:
        assert not (isinstance(node, ast.ImportFrom) and node.level)
        assert "ngrpo_lora" not in ast.unparse(node)
    names = defined(source)
    assert len(names) == len(set(names))  # two files with one name for two things would need care
    common = {"qwen_image_edit": ["qwen_editing.py"], "flux2": ["flux2_drawing.py"]}
    shared = next((files for name, files in common.items() if name in family), [])
    files = [sources() / name for name in ("neighbor_grpo.py", *shared, SCHEDULER, f"{family}.py")]
    assert names == [name for file in files for name in defined(file.read_text(encoding="utf-8"))]

    module = load(tmp_path / f"whole_{family}.py", source)
    assert get_relative_imports(tmp_path / f"whole_{family}.py") == []
    kind: Any = find_pipeline_class(module)  # diffusers takes the one that there is
    assert issubclass(kind, DiffusionPipeline)
    assert kind.scheduler_class is getattr(module, SCHEDULER_CLASS)
    for function in ("__call__", "load_lora_weights"):
        assert inspect.getmodule(getattr(kind, function)) is module


def test_the_scheduler_alone_is_one_file(tmp_path: Path):
    module = load(tmp_path / "scheduler_alone.py", scheduler_file())
    assert get_relative_imports(tmp_path / "scheduler_alone.py") == []
    scheduler = getattr(module, SCHEDULER_CLASS)()
    scheduler.set_timesteps(4)
    assert len(scheduler.sigmas) == 5
