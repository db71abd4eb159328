"""Commands without what takes long to load, and one that trains nothing."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest

from ngrpo_lora.config import RunConfig

HEAVY = ("training.trainer", "sampling.sampler", "sampling.settings", "sampling.recipes")


@pytest.fixture
def nothing_heavy(monkeypatch: pytest.MonkeyPatch):
    """A command that reaches for the trainer, a model or its libraries without need fails."""
    for name in (*(f"ngrpo_lora.{name}" for name in HEAVY), "diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in HEAVY:
        room, _, module = name.rpartition(".")
        monkeypatch.delattr(importlib.import_module(f"ngrpo_lora.{room}"), module, raising=False)


@pytest.fixture
def trained(nothing_heavy: None, monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Configurations that reached the trainer, which is replaced, as is what watches it."""
    seen: list[RunConfig] = []

    def replace(room: str, module: str, **content: Any) -> None:
        fake = ModuleType(f"ngrpo_lora.{room}.{module}")
        vars(fake).update(content)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setattr(importlib.import_module(f"ngrpo_lora.{room}"), module, fake, raising=False)

    replace("training", "trainer", train=lambda config, *watchers: seen.append(config))
    replace("hub", "watching", HubWatcher=object)
    replace("evaluation.report", "watching", Reporter=object)
    return seen
