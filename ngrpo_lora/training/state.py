"""What a run needs to go on bit for bit, and when it is written: at checkpoints, and whatever ends the run early."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.errors import SharedError, UserError
from ngrpo_lora.records import checkpoints
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.records.trees import memory_of
from ngrpo_lora.training.asking import MAX_HOURS
from ngrpo_lora.training.export import adapter_tensors, describe_adapter
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
    if run.processes.is_main:
        checkpoints.drop_after(run.output_dir, run.iteration)
        metrics = run.output_dir / "metrics.jsonl"
        run.best.recall(read_metrics(metrics) if metrics.is_file() else [], run.iteration)
    run.best = run.processes.broadcast(run.best)
    run.evaluation_missing = run.iteration == 0 or (run.evaluation_due and not is_evaluated(run))


def is_evaluated(run: Run) -> bool:
    """Whether the metrics file has the evaluation of the iteration that is complete; a crash may have cut it off."""
    found = False
    if run.processes.is_main and (path := run.output_dir / "metrics.jsonl").is_file():
        found = any(row["step"] == run.iteration and "eval/reward_mean" in row for row in read_metrics(path))
    return run.processes.broadcast(found)


def save(run: Run) -> None:
    """Start to write a checkpoint with the averaged adapter beside it, from a copy: training goes on meanwhile.

    All processes hold the same state; the main one writes. `run.saver` tells when it is on disk.
    """
    if run.processes.is_main:
        copied, folder, config, family = on_cpu(state(run)), run.output_dir, run.config, run.family
        best = copy(run.best)
        kept = best.kept

        def write(iteration: int = run.iteration) -> None:
            keep = config.trainer.keep_checkpoints
            tensors = adapter_tensors(family, copied["averaged"], config)
            header = describe_adapter(sorted(tensors), family, config)
            checkpoints.save(
                folder, iteration, copied, keep, lambda path: save_file(tensors, path / FILE_NAME, header), kept
            )
            best.write(folder)

        run.saver.start(run.iteration, write)


def check_complete(run: Run, reason: str | None) -> None:
    """Tell a run that was asked to stop from one that has reached its end, early or not.

    Args:
        reason: why it was asked to stop; of a signal, the screen has said it.
    Raises:
        SharedError: it was asked to stop, and can go on.
    """
    if not run.is_complete:
        total, why = run.config.trainer.num_iterations, f" ({reason})" if reason == MAX_HOURS else ""
        raise SharedError(f"stopped after iteration {run.iteration} of {total}{why}; go on with resume=latest")
    if run.best.is_out_of_patience and run.processes.is_main:
        where = checkpoints.checkpoint_dir(run.output_dir, run.best.iteration) if run.best.iteration else "none"
        log.info("ended early, at iteration %d: %s; the best adapter: %s", run.iteration, run.best, where)


@contextmanager
def checkpoint_on_error(run: Run) -> Iterator[None]:
    """Whatever ends the block before its time, a checkpoint of the last complete iteration is written.

    Where the evaluation of the base fails there is nothing to keep, and a corrected command begins in the same folder.
    """
    try:
        yield
    except BaseException as failure:
        if isinstance(failure, UserError) and run.iteration == 0 and run.evaluation_missing:
            raise
        try:
            if run.kept is not None:
                restore(run, run.kept)
                if run.processes.is_main:
                    checkpoints.drop_after(run.output_dir, run.iteration)
            save(run)
            run.saver.wait()
        except UserError as error:  # a full disk, which may be the first error's reason as well
            log.warning("no checkpoint could be written of iteration %d: %s", run.iteration, error)
        except Exception:  # a broken device
            log.warning("no checkpoint could be written of iteration %d", run.iteration, exc_info=True)
        raise


def on_cpu(nested: Any, copies: dict[Any, Tensor] | None = None) -> Any:
    """A copy of nested dictionaries and lists, their tensors in system memory; what is there twice is copied once."""
    copies = {} if copies is None else copies
    if isinstance(nested, dict):
        return {key: on_cpu(value, copies) for key, value in nested.items()}
    if isinstance(nested, list | tuple):
        return type(nested)(on_cpu(value, copies) for value in nested)
    if not isinstance(nested, Tensor):
        return nested
    memory = memory_of(nested)
    if memory is None or memory not in copies:
        copies[memory] = nested.detach().to("cpu", copy=True)
    return copies[memory]
