"""What looks on while a run goes (screen, metrics file, Hub, ComfyUI): it hears what happens, and may stop the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import nn

from ngrpo_lora.config import RunConfig
from ngrpo_lora.types import Metrics

if TYPE_CHECKING:  # it needs a web server, which only votes do
    from ngrpo_lora.voting.voting import Voting

__all__ = ["Start", "Watcher", "Watchers", "attend"]


@dataclass(frozen=True)
class Start:
    """What a run starts with, on this process.

    iteration: how many iterations are complete, 0 of a new run.
    processes: how many there are; is_main: whether this one writes files and talks to the user.
    trained, frozen: how many parameters the adapter and its transformer have.
    voting: the page at which people are asked, where a reward asks them; it is open until the run ends.
    """

    config: RunConfig
    iteration: int
    processes: int
    is_main: bool
    trained: int
    frozen: int
    voting: Voting | None = None


class Watcher:
    """Sees nothing, stops nothing. Whatever a method raises ends the run at once, with a checkpoint."""

    def before_start(self, start: Start) -> None:
        """Called once, when all parts of the run are there and before its first evaluation."""

    def before_pass(self) -> None:
        """Called before each part of every network, and several times a second while rewards are waited for."""

    def after_rewards(self, prompt: str, images: Sequence[Image.Image], rewards: Sequence[float]) -> None:
        """Called once an iteration with one group of candidates; the reward of one that has none is 0."""

    def after_update(self, step: int, metrics: Metrics) -> None:
        """Called when the adapter has moved for the `step`th time, before the evaluation that may follow."""

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Called when all metrics of an iteration are on disk; step 0 is the evaluation of the base model."""

    def after_save(self, step: int, last: bool) -> None:
        """Called when the checkpoint of an iteration is on disk; `last` where no iteration follows it."""

    def after_end(self, adapter: Path) -> None:
        """Called once, when a run has reached its end and its adapter is on disk."""

    def close(self) -> None:
        """Called when no iteration follows any more, however the run ended, and before `after_end`."""


class Watchers(Watcher):
    """Several watchers, told in their order."""

    def __init__(self, watchers: Iterable[Watcher]):
        self.all = tuple(watchers)
        self.of_passes = [w for w in self.all if type(w).before_pass is not Watcher.before_pass]

    @contextmanager
    def looking_on(self, start: Start) -> Iterator[None]:
        """`before_start` at its start, `close` at its end, whatever ends it."""
        try:
            self.before_start(start)
            yield
        finally:
            self.close()

    def before_start(self, start: Start) -> None:
        for watcher in self.all:
            watcher.before_start(start)

    def before_pass(self) -> None:
        for watcher in self.of_passes:
            watcher.before_pass()

    def after_rewards(self, prompt: str, images: Sequence[Image.Image], rewards: Sequence[float]) -> None:
        for watcher in self.all:
            watcher.after_rewards(prompt, images, rewards)

    def after_update(self, step: int, metrics: Metrics) -> None:
        for watcher in self.all:
            watcher.after_update(step, metrics)

    def after_step(self, step: int, metrics: Metrics) -> None:
        for watcher in self.all:
            watcher.after_step(step, metrics)

    def after_save(self, step: int, last: bool) -> None:
        for watcher in self.all:
            watcher.after_save(step, last)

    def after_end(self, adapter: Path) -> None:
        for watcher in self.all:
            watcher.after_end(adapter)

    def close(self) -> None:
        for watcher in self.all:
            watcher.close()


def attend(watchers: Watchers, modules: Iterable[nn.Module]) -> None:
    """Call `before_pass` before each forward pass of `modules`; where nobody listens, no module is touched."""
    if not watchers.of_passes:
        return

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        watchers.before_pass()

    for module in modules:
        module.register_forward_pre_hook(before)
