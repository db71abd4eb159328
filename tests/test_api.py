"""What `import ngrpo_lora` offers and what it costs."""

from __future__ import annotations

import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path

import ngrpo_lora


def test_a_star_import_gives_all_of_it(tmp_path: Path):
    (script := tmp_path / "star.py").write_text("from ngrpo_lora import *")
    given = {name for name in runpy.run_path(str(script)) if name not in runpy.run_path(os.devnull)}
    assert set(ngrpo_lora.__all__) == given


def test_the_names_are_sorted_and_documented():
    assert sorted(set(ngrpo_lora.__all__)) == ngrpo_lora.__all__
    for name in ngrpo_lora.__all__:
        assert inspect.getdoc(getattr(ngrpo_lora, name)), name


def test_the_issues_functions_are_there_with_their_signatures():
    expected = {
        "neighbor_noise": ["base", "deltas", "perturbation_strength"],
        "group_advantages": ["rewards", "p"],
        "leaping_log_ratio": ["candidates", "anchor_old", "displacement", "temperature"],
        "dpmpp_2m": ["velocity_fn", "latents", "sigmas"],
        "euler": ["velocity_fn", "latents", "sigmas"],
    }
    for name, arguments in expected.items():
        found = list(inspect.signature(getattr(ngrpo_lora, name)).parameters)
        assert found[: len(arguments)] == arguments


def test_importing_the_package_imports_only_torch():
    heavy = [
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "pydantic",
        "matplotlib",
        "scipy",
        "PIL",
        "bitsandbytes",
    ]
    code = f"import sys, ngrpo_lora; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
