"""Micro-batches that are halved where memory runs out, so that a night's run goes on with the same result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from ngrpo_lora.config import RunConfig
from ngrpo_lora.devices import is_out_of_memory, release_memory
from ngrpo_lora.errors import OutOfMemory, first_line

__all__ = ["MicroBatch", "MicroBatches"]

log = logging.getLogger(__name__)
T = TypeVar("T")


class MicroBatch:
    """How many samples or transitions go through the networks at once; it only ever becomes smaller.

    key: the setting that it starts with.
    size: what has fitted into memory so far.
    is_fixed: memory that runs out ends the run, as all processes must make the same passes.
    """

    def __init__(self, key: str, size: int, is_fixed: bool = False):
        self.key, self.size, self.is_fixed = key, size, is_fixed

    def fit(self, work: Callable[[int], T]) -> T:
        """Return `work(size)`, called anew with half the size for as long as memory runs out.

        Args:
            work: leaves nothing behind where it fails.
        Raises:
            OutOfMemory: memory runs out with one at a time, or the size is fixed.
        """
        while True:
            try:
                return work(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Here, where no traceback holds the tensors of what failed.
            release_memory()
            self.halve(reason)

    def halve(self, reason: str) -> None:
        """Go on with half the size, and say so."""
        if self.size == 1 or self.is_fixed:
            raise OutOfMemory(self.key, self.size, reason)
        self.size, before = self.size // 2, self.size
        log.warning(
            "out of memory with %s=%d (%s): the same is computed with %d at once from here on; %s=%d saves the attempt "
            "next time",
            *(self.key, before, reason, self.size, self.key, self.size),
        )


class MicroBatches:
    """Those of a run: of its rollouts, of its updates and of its evaluations."""

    def __init__(self, config: RunConfig, are_fixed: bool):
        rollout = config.rollout
        self.rollout = MicroBatch("rollout.micro_batch_size", rollout.micro_batch_size or rollout.group_size, are_fixed)
        self.update = MicroBatch("trainer.micro_batch_size", config.trainer.micro_batch_size, are_fixed)
        self.evaluation = MicroBatch("evaluation.micro_batch_size", config.evaluation.micro_batch_size, are_fixed)

    def fix(self) -> None:
        """Let memory that runs out end the run from here on, as a measure of these very sizes wants it."""
        for batch in (self.rollout, self.update, self.evaluation):
            batch.is_fixed = True
