"""Presets: complete configurations by model, and short ones that `extends` them for a memory size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Preset", "describe_presets", "preset_files"]

NEEDS = re.compile(r"^# Needs (.+) by `ngrpo plan`; measured: (.+)\.$", re.MULTILINE)


@dataclass(frozen=True)
class Preset:
    """What the head of a preset's file says: its purpose, the memory that it needs, and whether that was measured."""

    name: str
    model: str
    purpose: str
    needs: str
    measured: str


def preset_files() -> Iterator[Preset]:
    """All presets; those for a memory size after what they extend."""
    files = {path.stem: path for path in Path(__file__).parent.glob("*.yaml")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    data = {name: yaml.safe_load(text) for name, text in texts.items()}
    for name in sorted(files, key=lambda name: (data[name].get("extends", name), memory(name))):
        base = data[name].get("extends", name)
        head = NEEDS.search(texts[name])
        needs, measured = head.groups() if head else ("", "")
        purpose = texts[name].splitlines()[0].removeprefix("# ").rstrip(".:")
        yield Preset(name, data[base]["model"].get("path", "embedded"), purpose, needs, measured)


def memory(name: str) -> int:
    """GB of all GPUs that a name ends with, 0 of one that names none."""
    found = re.search(r"-(?:(\d+)x)?(\d+)gb$", name)
    return int(found[1] or 1) * int(found[2]) if found else 0


def describe_presets() -> Any:
    """The presets as a table of rich's."""
    from rich.table import Table

    table = Table("preset", "what for", "needs", "measured", box=None, pad_edge=False)
    for preset in preset_files():
        table.add_row(preset.name, preset.purpose, preset.needs, preset.measured)
    return table
