"""Starts a run as several processes of this machine, and ends all of them when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from ngrpo_lora.errors import UserError

__all__ = ["launch", "process_count"]


GRACE_S = 20.0  # what the others get to end by themselves once one process has failed


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


def launch(count: int, command: Sequence[str]) -> int:
    """Run `command` as `count` processes of this machine; returns the exit status of the first that failed, or 0.

    Ctrl-C reaches all of them from the terminal; this process only waits. When one fails, the others end by
    themselves within seconds, as their next exchange with it does; what is left after a while is terminated.
    """
    port = free_port()
    processes = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // count))}
        processes.append(subprocess.Popen([*command], env=os.environ | {k: str(v) for k, v in place.items()}))
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminate = signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes])
    try:
        return wait_for(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        signal.signal(signal.SIGINT, previous)
        signal.signal(signal.SIGTERM, terminate)


def wait_for(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; after the first failure only for a while."""
    status, deadline = 0, None
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if process.poll() and not status:
                status, deadline = process.returncode, time.monotonic() + GRACE_S
                if status < 0:
                    name = signal.Signals(-status).name
                    sys.stderr.write(
                        f"ngrpo: process {rank} of {len(processes)} was killed ({name}"
                        f"{', often for lack of memory' if name == 'SIGKILL' else ''}); go on with resume=latest\n"
                    )
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.terminate()
            deadline = time.monotonic() + GRACE_S
        time.sleep(0.1)
    return status or next((process.returncode for process in processes if process.returncode), 0)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
