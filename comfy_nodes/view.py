"""A run as its node shows it while it goes on: progress, the curve with a group of candidates, and Cancel."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from PIL import Image

from ngrpo_lora.config import RunConfig
from ngrpo_lora.reports.curves import Group, draw_progress
from ngrpo_lora.training.watcher import Start, Watcher
from ngrpo_lora.types import Metrics

from ._api import show_progress
from .voting import ShownPage

PREVIEW_S = 1.0
PREVIEW_SHARE = 0.05
"""Largest share of the time that previews take."""


class View(Watcher):
    """Watcher that shows a run at its node; Cancel stops the run."""

    def __init__(self, config: RunConfig, node: type[io.ComfyNode]):
        self.folder, self.total, self.node = Path(config.output_dir), config.trainer.num_iterations, node
        self.bar = comfy.utils.ProgressBar(self.total, node_id=node.hidden.unique_id)
        self.group: Group | None = None
        self.first: tuple[int, float] | None = None  # step and time of the first that was seen
        self.next_preview = 0.0
        self.done = 0  # iterations
        self.page: ShownPage | None = None

    def before_start(self, start: Start) -> None:
        self.done = start.iteration
        self.page = start.voting and ShownPage(start.voting, self.node)

    def before_pass(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.page is not None:
            self.page.show(f"iteration {self.done + 1} of {self.total}")

    def after_rewards(self, prompt: str, images: Sequence[Image.Image], rewards: Sequence[float]) -> None:
        self.group = Group(prompt, images, rewards)

    def after_step(self, step: int, metrics: Metrics) -> None:
        now, self.done = time.monotonic(), step
        self.first = self.first or (step, now)
        preview = None
        if now >= self.next_preview or step >= self.total:
            preview = ("JPEG", draw_progress(self.folder, self.group), None)
            drawn = time.monotonic()
            self.next_preview = drawn + max(PREVIEW_S, (drawn - now) / PREVIEW_SHARE)
        self.bar.update_absolute(step, preview=preview)
        show_progress(self.text(step, now, metrics), self.node)

    def close(self) -> None:
        if self.page is not None:
            self.page.close()
        self.page = None  # pictures are drawn still, to check what was exported

    def text(self, step: int, now: float, metrics: Metrics) -> str:
        """Say which iteration a run is at, its rewards, and how many minutes are left."""
        said = [f"iteration {step} of {self.total}"]
        for key, name in (("rollout/reward_mean", "reward"), ("eval/reward_mean", "held-out")):
            if not math.isnan(metrics.get(key, math.nan)):  # people are asked about no held-out pictures
                said.append(f"{name} {metrics[key]:.3f}")
        first, start = self.first or (step, now)
        if step > first:
            said.append(f"{(now - start) / (step - first) * (self.total - step) / 60:.0f} min left")
        return ", ".join(said)


class Warnings(logging.Handler):
    """Keeps the warnings of a run, which are for who started it: a trainer's error says that the reasons are above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
