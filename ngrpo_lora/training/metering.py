"""What an iteration costs: function evaluations, counted and not estimated, and the time and memory of its stages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ngrpo_lora.training.processes import Processes
from ngrpo_lora.types import Metrics

STAGES = ("rollout", "reward", "update")
"""The stages of an iteration, each with its time in the metrics."""


class EvaluationCounter:
    """Counts samples through modules, separately for passes with and without gradients: NFE_theta and NFE_old."""

    def __init__(self, modules: Iterable[nn.Module], processes: Processes):
        self.processes = processes
        self.old = self.theta = 0
        self.active = True
        for module in modules:
            module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active:
            samples = len(args[0] if args else kwargs["hidden_states"])
            if torch.is_grad_enabled():
                self.theta += samples
            else:
                self.old += samples

    def reset(self) -> None:
        """Count anew, as at the start of an iteration."""
        self.old = self.theta = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count, for as long as the context lasts."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def per_sample(self, samples: int) -> Metrics:
        """Function evaluations of all processes since `reset`, divided by the samples of the iteration."""
        old, theta = map(sum, zip(*self.processes.gather((self.old, self.theta)), strict=True))
        return {"nfe/old_per_sample": old / samples, "nfe/theta_per_sample": theta / samples}


class Stages:
    """Wall time of the stages of an iteration, and on a GPU the most memory that PyTorch held in each.

    A stage ends when the GPU has done all that it was given.
    """

    def __init__(self) -> None:
        self.metrics: Metrics = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, on_gpu = time.perf_counter(), torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if on_gpu:
            torch.cuda.synchronize()
            self.metrics[f"memory/{stage}_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.metrics[f"time/{stage}_s"] = time.perf_counter() - start


def iteration_seconds(metrics: Metrics) -> float:
    """How long an iteration took, without an evaluation."""
    return sum(metrics[f"time/{stage}_s"] for stage in STAGES)
