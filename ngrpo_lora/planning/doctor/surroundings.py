"""What surrounds a run: the Hub, ComfyUI, and the variables of a launcher."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import ngrpo_lora
from ngrpo_lora.errors import UserError
from ngrpo_lora.planning.doctor.findings import Finding
from ngrpo_lora.ranks import launched

__all__ = ["comfyui", "hub", "launcher"]

WHOAMI_S = 10
MIN_COMFYUI = "0.3.75"
"""The `requires-comfyui` of pyproject.toml, which an installed package does not have."""


def hub(online: bool) -> Iterator[Finding]:
    """Whether the Hub may be asked, and, where it is asked, whether it accepts the token."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        text = "HF_HUB_OFFLINE is set, so that nothing is downloaded or pushed"
        yield Finding("Hub", "note", text, "unset it to use the Hub")
    elif get_token() is None:
        remedy = "for gated models (FLUX.1-dev) and to push, `hf auth login`, or set HF_TOKEN"
        yield Finding("Hub", "note", "no token", remedy)
    elif not online:
        yield Finding("Hub", "ok", "a token is there; --online asks whether it is accepted")
    else:
        from ngrpo_lora.hub.pushing import explain, within

        try:
            role = within(WHOAMI_S, HfApi().whoami).get("auth", {}).get("accessToken", {}).get("role", "unknown")
        except Exception as error:
            text, _, remedy = explain(error).partition("; ")
            yield Finding("Hub", "problem", text, remedy)
        else:
            yield Finding("Hub", "ok", f"the token is accepted (role: {role})")


def comfyui() -> Iterator[Finding]:
    """Where ComfyUI is, as far as can be seen from here, and whether it is new enough for the nodes."""
    root = comfyui_above(Path(ngrpo_lora.__file__))
    if root is None and find_spec("comfy_api") is None and find_spec("comfy") is None:
        yield Finding("ComfyUI", "ok", "not seen from here; only the nodes need it")
        return
    where = "around this package" if root is not None else "importable"
    if (found := comfyui_version(root)) is None:
        remedy = f"make sure that it is {MIN_COMFYUI} or newer"
        yield Finding("ComfyUI", "note", f"{where}, of unknown version", remedy)
        return

    from packaging.version import Version

    if Version(found) < Version(MIN_COMFYUI):
        text = f"{found}, {where}, is older than {MIN_COMFYUI}, which the nodes need"
        yield Finding("ComfyUI", "problem", text, "update ComfyUI")
    else:
        yield Finding("ComfyUI", "ok", f"{found}, {where}")


def comfyui_above(file: Path) -> Path | None:
    """The folder of the ComfyUI in whose custom_nodes a file lies."""
    return next((parent.parent for parent in file.parents if parent.name == "custom_nodes"), None)


def comfyui_version(root: Path | None) -> str | None:
    """The version that ComfyUI states in a module of its own, which is read and not run."""
    spec = None if root is None else PathFinder.find_spec("comfyui_version", [str(root)])
    spec = spec or find_spec("comfyui_version")
    if spec is None or spec.origin is None:
        return None
    stated = re.search(r"__version__ = ['\"](.+?)['\"]", Path(spec.origin).read_text(encoding="utf-8"))
    return stated and stated[1]


def launcher() -> Iterator[Finding]:
    """Whether the variables of a launcher contradict each other, as where one is left from another program."""
    try:
        text = "one of several processes" if launched() else "none started this process"
        yield Finding("launcher", "ok", text)
    except UserError as error:
        text, _, remedy = str(error).partition("; ")
        yield Finding("launcher", "problem", text, remedy)
