"""What looks on while a run goes: the trainer tells it, and it may stop the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image
from torch import nn

from ngrpo_lora.types import Metrics

__all__ = ["Watcher", "attend"]


class Watcher:
    """Sees nothing, stops nothing. Whatever a method raises ends the run at once, with a checkpoint."""

    def before_pass(self) -> None:
        """Called before each part of every network, and several times a second while rewards are waited for."""

    def after_rewards(self, prompt: str, images: Sequence[Image.Image], rewards: Sequence[float]) -> None:
        """Called once an iteration with one group of candidates; the reward of one that has none is 0."""

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Called when all metrics of an iteration are on disk; step 0 is the evaluation of the base model."""


def attend(watcher: Watcher, modules: Iterable[nn.Module]) -> None:
    """Call `before_pass` before each forward pass of `modules`."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        watcher.before_pass()

    for module in modules:
        module.register_forward_pre_hook(before)
