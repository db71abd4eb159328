"""Which process this is, among those that a launcher has started: what its environment variables say."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ngrpo_lora.errors import UserError

__all__ = ["is_first", "launched", "process_device", "several_wanted", "started_alone"]

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun and accelerate, Open MPI, and the MPICH family say how many processes there are."""

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
"""Where they say which of them a process is."""

OF_PROCESS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and accelerate set beside WORLD_SIZE, in each process that they start."""


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several that a launcher started.

    Raises:
        UserError: the variables contradict each other, as where one of them is left from another program.
    """
    name = next((name for name in SIZES if name in environment), None)
    if name is None:
        return False
    size, stale = environment[name], f"unset {name}, or start the run by accelerate launch or torchrun"
    if not size.isdecimal() or int(size) < 1:
        raise UserError(
            f"the environment variable {name} must be a number of processes, at least 1, got {size!r}; {stale}"
        )
    if size == "1" or name != SIZES[0]:
        return size != "1"
    if missing := [one for one in OF_PROCESS if one not in environment]:
        raise UserError(
            f"the environment variable WORLD_SIZE={size} says that a launcher started this process, which must then "
            f"have {', '.join(missing)} too; {stale}"
        )
    for one in ("RANK", "LOCAL_RANK"):
        if not environment[one].isdecimal() or int(environment[one]) >= int(size):
            raise UserError(
                f"the environment variable {one} must be a number from 0 to {int(size) - 1} with WORLD_SIZE={size}, "
                f"got {environment[one]!r}; {stale}"
            )
    return True


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of those that a launcher started, which writes files for all, or the only."""
    return next((environment[name] for name in RANKS if name in environment), "0") == "0"


def started_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or `accelerate launch` started this process as the only one; it should start no others."""
    return "RANK" in environment or "ACCELERATE_MIXED_PRECISION" in environment


def several_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` was asked for several processes on a CPU, which it starts by mpirun alone."""
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
    return on_cpu and "MASTER_ADDR" in environment and not any(name in environment for name in SIZES)


def process_device(device: str) -> str:
    """Resolve `cuda` to this process's own GPU where a launcher started several; other devices stay as they are."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and launched() else device
