"""Presets: complete configurations by model, and short ones that `extends` them for a memory size."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.world import MODELS

__all__ = ["Preset", "check_model", "describe_presets", "preset_files"]

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

MEMORY = re.compile(r"-(?:(\d+)x)?(\d+)gb$")
NEEDS = re.compile(r"^# Needs (.+) by `ngrpo plan`; measured: (.+)\.$", re.MULTILINE)


@dataclass(frozen=True)
class Preset:
    """A preset with what the head of its file says: its purpose, the memory that it needs, and what was measured."""

    name: str
    model: str
    purpose: str
    needs: str
    measured: str


def preset_files() -> Iterator[Preset]:
    """All shipped presets in the order of their names, each model's variants by memory."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.yaml")}
    own = {name: yaml.safe_load(text) for name, text in files.items()}

    def model_of(name: str) -> str:
        given = own[name].get("model", {}).get("path")
        return given or (model_of(own[name]["extends"]) if "extends" in own[name] else "embedded")

    for name in sorted(files, key=lambda name: (MEMORY.sub("", name), memory(name))):
        head = NEEDS.search(files[name])
        needs, measured = head.groups() if head else ("", "")
        purpose = files[name].splitlines()[0].removeprefix("# ").rstrip(".:")
        yield Preset(name, model_of(name), purpose, needs, measured)


def check_model(path: str, what: str = "model.path") -> None:
    """Check, without a network, that a path is a model of the package or a folder, or may be a model of the Hub.

    Args:
        what: the setting, with which the message begins.
    Raises:
        ConfigError: it is none of them; the message leads from the name of a preset, or of a model alone, to the model.
    """
    if path in MODELS or Path(path).is_dir() or HUB_ID.fullmatch(path):
        return
    known: dict[str, str] = {}
    for preset in preset_files():
        for name in (preset.name, preset.model.rpartition("/")[2].lower()):
            known.setdefault(name, preset.model)
    close = difflib.get_close_matches(path.lower(), known, n=1)
    remedy = f"did you mean {known[close[0]]}?" if close else "`ngrpo presets` lists some"
    models = ", ".join(MODELS)
    raise ConfigError(f"{what} must be {models}, a diffusers folder or a Hub id (owner/name), got {path!r}; {remedy}")


def memory(name: str) -> int:
    """GB of all GPUs together that a preset's name ends with; 0 where it names none."""
    found = MEMORY.search(name)
    return int(found[1] or 1) * int(found[2]) if found else 0


def describe_presets() -> Any:
    """The presets as a table of rich's."""
    from rich.table import Table

    table = Table("preset", "model", "what for", "needs", "measured", box=None, pad_edge=False)
    for preset in preset_files():
        table.add_row(preset.name, preset.model, preset.purpose, preset.needs, preset.measured)
    return table
