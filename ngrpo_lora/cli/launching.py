"""Starts a run as several processes of this machine, and ends all of them when one fails."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from uuid import uuid4

import psutil

from ngrpo_lora.errors import UserError

__all__ = ["has_checked", "launch", "process_count"]

LOCAL = "127.0.0.1"
CHECKED = "NGRPO_LORA_CHECKED"
"""Environment variable of the processes that are started here, once the run is checked and the user is told."""


def process_count(device: str, asked: int | None, on_cpu: int = 1) -> int:
    """How many processes `ngrpo train` starts: as many as asked for, else one for each GPU that may be used.

    On a CPU it is `on_cpu`, if there are as many cores.

    Raises:
        UserError: more are asked for than there are GPUs.
    """
    import torch

    from ngrpo_lora.devices import resolve_device

    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if asked is not None and asked > 1 and (gpus or device.startswith("cuda")) and asked > gpus:
        raise UserError(
            f"--num-processes must be at most the number of GPUs ({gpus}) for model.device={device}, got {asked}; "
            "model.device=cpu runs several on a CPU"
        )
    if not gpus and device in ("auto", "cpu") and resolve_device(device) == "cpu":
        return asked or min(on_cpu, os.cpu_count() or 1)
    return asked or gpus or 1


def has_checked() -> bool:
    """Whether this process is one of those that `launch` has started, whose run was checked before."""
    return CHECKED in os.environ


def hand_on_requests_to_save(command: Sequence[str]) -> None:
    """Pass SIGUSR1, which schedulers send some time before the end, on to the processes that `command` started."""

    def hand_on(signum: int, frame: object) -> None:
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[-len(command) :] == [*command]:
                    process.send_signal(signum)

    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, hand_on)


def launch(count: int, command: Sequence[str], patience_s: float) -> int:
    """Run `command` as `count` processes of this machine by torch's elastic agent; returns an exit status.

    Ctrl-C and SIGTERM are handed to all of them, which end after their iteration; a second one ends them at once. When
    one fails, the others end as their next exchange with it does.

    Args:
        patience_s: how long processes that were asked to end may take.
    Returns:
        0, or that of the first process that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[CHECKED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(patience_s))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # messages here say the same
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOCAL}:0",
        local_addr=LOCAL,
        max_restarts=0,
    )
    hand_on_requests_to_save(command)
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        killed = {rank: failure for rank, failure in error.failures.items() if failure.exitcode < 0}
        for rank, failure in killed.items():
            if failure.exitcode != -signal.SIGTERM:  # with which the agent ends the others
                name = failure.signal_name()
                why = ", often for lack of memory" if name == "SIGKILL" else ""
                message = f"ngrpo: process {rank} of {count} was killed ({name}{why}); go on with resume=latest\n"
                sys.stderr.write(message)
                return 1
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except SignalException:
        return 2
    finally:
        for process in psutil.Process().children(recursive=True):  # after a second Ctrl-C
            process.kill()
    return 0
