"""`ngrpo train`: one fine-tune command, on one process or several."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from ngrpo_lora.cli.app import RunArguments, split_arguments, system_error
from ngrpo_lora.errors import SharedError, UserError

if TYPE_CHECKING:
    from ngrpo_lora.config import RunConfig

log = logging.getLogger(__name__)

MEETING_S = 60.0
"""How long processes wait for each other whose configuration cannot be read."""


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

    All GPUs of this machine take part. For several machines start it with `accelerate launch` or `torchrun`, such as
    `torchrun ... -m ngrpo_lora train ...`.
    """
    from ngrpo_lora.ranks import launched, several_wanted, started_alone

    if hasattr(signal, "SIGUSR1"):  # it asks for a checkpoint, and would end a process that does not train yet
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if launched():
        _train_as_one_of_several(arguments)
        return
    from ngrpo_lora.config import load_config

    config = load_config(*split_arguments(arguments))

    from ngrpo_lora.cli import launching
    from ngrpo_lora.planning.preflight import check_run

    check_run(config)
    if several_wanted():
        log.warning(
            "accelerate launch has started one process, as it starts several on a CPU by mpirun alone; "
            "ngrpo train --num-processes N and torchrun do without"
        )
    alone = started_alone() or config.rewards.asks_people  # one page, which one process has
    asked = 1 if num_processes is None and alone else num_processes
    count = launching.process_count(config.model.device, asked, config.trainer.cpu_processes)
    _advise(config, count)
    if count == 1:
        _train(config)
        return
    command = [sys.executable, "-m", "ngrpo_lora", "train", *(arguments or [])]
    if status := launching.launch(count, command, config.trainer.timeout_s):
        raise typer.Exit(status)


def _train_as_one_of_several(arguments: list[str] | None) -> None:
    """Check on every process, agree, and train; a problem that all have is shown once."""
    from ngrpo_lora.cli.launching import has_checked
    from ngrpo_lora.config import load_config
    from ngrpo_lora.devices import resolve_device
    from ngrpo_lora.planning.preflight import check_run
    from ngrpo_lora.training.processes import Processes

    config, problem, device, timeout_s = None, None, "cpu", MEETING_S
    try:
        config = load_config(*split_arguments(arguments))
        device, timeout_s = resolve_device(config.model.device), config.trainer.timeout_s
    except UserError as error:
        problem = str(error)
    processes = Processes(device, timeout_s)
    try:
        if not processes.is_main:  # what there is to say of files is said once
            logging.getLogger("ngrpo_lora.adapters").setLevel(logging.ERROR)
        elif config is not None:
            with unsaid() if has_checked() else nullcontext():
                problem = _problem(check_run, config)
        if problem := processes.agree(problem):
            raise SharedError(problem)
        assert config is not None  # else there is a problem
        _train(config)
    except (UserError, OSError) as error:
        message = system_error(error) if isinstance(error, OSError) else str(error)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers end all processes when the first one ends
        shared = isinstance(error, SharedError)
        if processes.is_main or not shared:
            typer.echo(f"ngrpo: {message}", err=True)
        if shared:
            processes.wait()
        raise typer.Exit(2) from None


@contextmanager
def unsaid() -> Iterator[None]:
    """Keep warnings of this package to itself within the block, where they were said before."""
    ours = logging.getLogger("ngrpo_lora")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)


def _advise(config: RunConfig, gpus: int) -> None:
    """Say before anything large is downloaded what will not do well, and what would."""
    from ngrpo_lora.models._distilled import distilled_note

    for text in (distilled_note(config), _shortage(config, gpus)):
        if text is not None:
            typer.echo(f"ngrpo: {text}", err=True)


def _shortage(config: RunConfig, gpus: int) -> str | None:
    """That the GPU is too small, and what would make the run fit."""
    import torch

    if not (torch.cuda.is_available() and config.model.device.startswith(("auto", "cuda"))):
        return None
    from ngrpo_lora import devices
    from ngrpo_lora.planning.report import shortage

    try:
        return shortage(config, devices.free_memory(), gpus)
    except (UserError, subprocess.CalledProcessError):  # a model or a GPU that cannot be used says so when it is
        return None


def _train(config: RunConfig) -> None:
    from ngrpo_lora.evaluation.report.guard import Guard
    from ngrpo_lora.evaluation.report.watching import Reporter
    from ngrpo_lora.hub.watching import HubWatcher
    from ngrpo_lora.training import trainer

    trainer.train(config, Guard(), Reporter(), HubWatcher())


def _problem(check: Callable[[RunConfig], None], config: RunConfig) -> str | None:
    """The message of a check that fails."""
    try:
        check(config)
    except UserError as error:
        return str(error)
    return None
