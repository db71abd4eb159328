"""ComfyUI nodes over `ngrpo_lora`: sample, train, score and compare in the node graph.

The folder is loaded by ComfyUI as a package of its own, through the repository's root or as custom_nodes/NAME
itself. One file holds the nodes of one subject; what they compute is in `ngrpo_lora`.
"""

import importlib.util
import sys
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

if importlib.util.find_spec("ngrpo_lora") is None:  # a clone in custom_nodes/ that was not installed
    sys.path.append(str(Path(__file__).resolve().parent.parent))

folder_paths.add_model_folder_path("loras", str(Path(__file__).resolve().parent / "loras"))  # an example

from ngrpo_lora import registry  # noqa: E402

registry.allow_modules = False  # a graph may come from a stranger, and to import a module is to run it

from . import (  # noqa: E402
    adapters,
    comparing,
    conditioning,
    embedded,
    joining,
    pipelines,
    rewards,
    sampling,
    scoring,
    training,
    voting,
)

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


class NeighborGRPOExtension(ComfyExtension):
    """The extension that gives ComfyUI all nodes of this package."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order of ComfyUI's menu."""
        judging = (rewards, voting, scoring, comparing, joining)
        subjects = (embedded, sampling, adapters, *judging, conditioning, pipelines, training)
        return [node for subject in subjects for node in subject.NODES]


async def comfy_entrypoint() -> NeighborGRPOExtension:
    """Make the extension; ComfyUI calls this function when it loads the package."""
    if (server := getattr(PromptServer, "instance", None)) is not None:  # none where nodes are only looked at
        voting.add_route(server)
    return NeighborGRPOExtension()
