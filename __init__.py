"""ComfyUI finds its nodes here when this repository is cloned into custom_nodes/; elsewhere the file does nothing."""

import sys

if __package__ and "comfy_api" in sys.modules:
    from .comfy_nodes import comfy_entrypoint

    WEB_DIRECTORY = "./comfy_nodes/web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
