"""What a run needs to go on bit for bit, and when it is written: at checkpoints, and whatever ends the run early."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.console import console
from ngrpo_lora.errors import SharedError, UserError
from ngrpo_lora.records import checkpoints
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.training.export import save_adapter
from ngrpo_lora.training.run import Run

log = logging.getLogger(__name__)


def state(run: Run) -> dict[str, Any]:
    """What `restore` needs; tensors and plain values only."""
    return {"iteration": run.iteration} | run.lora_step.state()


def restore(run: Run, saved: dict[str, Any]) -> None:
    """Go on from a checkpoint of the same adapter.

    Raises:
        UserError: the checkpoint's adapter has other layers or another rank.
    """
    run.lora_step.restore(saved)
    run.iteration = saved["iteration"]


def resume(run: Run, checkpoint: str) -> None:
    """Go on from `latest` or a checkpoint's path, which the main process reads for all.

    Raises:
        UserError: there is none, or it cannot be read, or it is of another adapter.
    """
    problem, saved = None, {}
    if run.processes.is_main:
        try:
            saved = checkpoints.load(checkpoint, run.output_dir, "cpu")
        except UserError as error:
            problem = str(error)
    if problem := run.processes.agree(problem):
        raise SharedError(problem)
    restore(run, run.processes.broadcast(saved))
    run.evaluation_missing = run.iteration == 0 or (run.evaluation_due and not is_evaluated(run))


def is_evaluated(run: Run) -> bool:
    """Whether the metrics file has the evaluation of the iteration that is complete; a crash may have cut it off."""
    found = False
    if run.processes.is_main and (path := run.output_dir / "metrics.jsonl").is_file():
        found = any(row["step"] == run.iteration and "eval/reward_mean" in row for row in read_metrics(path))
    return run.processes.broadcast(found)


def save(run: Run) -> None:
    """Write a checkpoint, and into it the averaged adapter; all processes hold the same state."""
    if run.processes.is_main:
        keep = run.config.trainer.keep_checkpoints
        folder = checkpoints.save(run.output_dir, run.iteration, state(run), keep)
        with lora.swapped(run.family.transformer, run.lora_step.averaged):
            save_adapter(folder / FILE_NAME, run.family, run.config)


def check_complete(run: Run) -> None:
    """Tell a run that was asked to stop from one that has reached its end.

    Raises:
        SharedError: it was asked to stop, and can go on.
    """
    if not run.is_complete:
        total = run.config.trainer.num_iterations
        raise SharedError(f"stopped after iteration {run.iteration} of {total}; go on with resume=latest")


@contextmanager
def checkpoint_on_error(run: Run) -> Iterator[None]:
    """Whatever ends the block before its time, a checkpoint of the last complete iteration is written."""
    try:
        yield
    except BaseException:
        try:
            if run.kept is not None:
                restore(run, run.kept)
            save(run)
        except Exception:  # a full disk or a broken device, which may be the first error's reason as well
            log.warning("no checkpoint could be written of iteration %d", run.iteration, exc_info=True)
        raise


ASKING = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
"""Signals that ask a run to stop; SIGTERM also comes from launchers, which end all processes when one has failed."""


@contextmanager
def interrupt_asked(tell: bool) -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after this iteration; a second one stops at once.

    Args:
        tell: whether to say so.
    """
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if tell:
            name = ASKING[signal.Signals(signum)]
            console.print(f"{name}: stopping after this iteration; a second one stops at once")

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {one: signal.signal(one, ask) for one in ASKING}
    try:
        yield lambda: asked
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


def on_cpu(nested: Any) -> Any:
    """A copy of nested dictionaries and lists, their tensors in system memory."""
    if isinstance(nested, dict):
        return {key: on_cpu(value) for key, value in nested.items()}
    if isinstance(nested, list | tuple):
        return type(nested)(map(on_cpu, nested))
    return nested.detach().to("cpu", copy=True) if isinstance(nested, Tensor) else nested
