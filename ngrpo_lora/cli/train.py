"""`ngrpo train`: one fine-tune command, on one process or several."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from ngrpo_lora.cli.app import RunArguments, split_arguments
from ngrpo_lora.errors import SharedError, UserError

if TYPE_CHECKING:
    from ngrpo_lora.config import RunConfig


def train(
    arguments: RunArguments = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on this machine; default: one for each GPU, trainer.cpu_processes on a CPU.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a LoRA: `ngrpo train` for the embedded demo, `ngrpo train run.yaml trainer.num_iterations=100`.

    All GPUs of this machine take part. For several machines start it with `torchrun ... -m ngrpo_lora train ...`.
    """
    from ngrpo_lora.config import load_config

    config = load_config(*split_arguments(arguments))

    from ngrpo_lora.cli import launching
    from ngrpo_lora.planning.preflight import check_run
    from ngrpo_lora.ranks import launched

    if launched():
        from ngrpo_lora.training.processes import Processes

        processes = Processes(config.trainer.timeout_s)
        if problem := processes.agree(_problem(check_run, config) if processes.is_main else None):
            raise SharedError(problem)
        _train(config)
        return
    check_run(config)
    count = launching.process_count(config.model.device, num_processes, config.trainer.cpu_processes)
    _warn_of_shortage(config, count)
    if count == 1:
        _train(config)
    elif status := launching.launch(count, [sys.executable, "-m", "ngrpo_lora", "train", *(arguments or [])]):
        raise typer.Exit(status if status > 0 else 1)


def _warn_of_shortage(config: RunConfig, gpus: int) -> None:
    """Say before anything large is downloaded that the GPU is too small, and what would make the run fit."""
    import torch

    if not (torch.cuda.is_available() and config.model.device.startswith(("auto", "cuda"))):
        return
    from ngrpo_lora import devices
    from ngrpo_lora.planning.report import shortage

    try:
        text = shortage(config, devices.free_memory(), gpus)
    except (UserError, subprocess.CalledProcessError):  # a model or a GPU that cannot be used says so when it is
        return
    if text is not None:
        typer.echo(f"ngrpo: {text}", err=True)


def _train(config: RunConfig) -> None:
    from ngrpo_lora.hub.watching import HubWatcher
    from ngrpo_lora.training import trainer

    trainer.train(config, HubWatcher())


def _problem(check: Callable[[RunConfig], None], config: RunConfig) -> str | None:
    """The message of a check that fails."""
    try:
        check(config)
    except UserError as error:
        return str(error)
    return None
