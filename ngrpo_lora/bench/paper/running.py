"""Runs training jobs as processes of the ordinary command, some at once, and goes on where they were stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ngrpo_lora.bench.paper.outcomes import check_whole, evaluated, is_complete
from ngrpo_lora.bench.paper.plan import Job
from ngrpo_lora.config import changed_keys, dump_config, load_config
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.records.checkpoints import checkpoints
from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.records.ownership import owner

__all__ = ["Failure", "Stopped", "check_folders", "places", "run_all"]

GRACE_S = 120.0  # what runs get to finish their iteration and write a checkpoint once they are asked to stop
POLL_S = 0.2
MAY_DIFFER = ("output_dir:", "resume:")

Failure = tuple[Job, str]
"""A run that ended with an error, and the last line that it wrote."""


class Stopped(UserError):
    """The command was asked to stop; all that is complete stays, and the same command goes on."""


def check_folders(jobs: Sequence[Job]) -> None:
    """Make sure that every run that there is has the settings that are wanted now, and is whole where it is complete.

    Raises:
        ConfigError: one has others, or cannot be read; nothing is ever mixed.
        UserError: one is under way, as where an earlier command was killed and its runs were not.
    """
    for job in jobs:
        if used := owner(job.folder):
            raise UserError(used)
        if is_complete(job):
            check_whole(job)
        path = job.folder / "config.yaml"
        if not path.is_file():
            continue
        try:
            changed = [c for c in changed_keys(load_config(path), job.config) if not c.startswith(MAY_DIFFER)]
        except ConfigError as error:
            raise ConfigError(
                f"{path} is not of this version: {error.problems[0]}; give another --output-dir"
            ) from None
        if changed:
            raise ConfigError(
                f"runs of one comparison must have its settings, but {str(job.folder)!r} was made with others "
                f"({'; '.join(changed[:3])}); give another --output-dir, or remove that folder"
            )


def run_all(
    jobs: Sequence[Job], at_once: int, later: Sequence[Job], folder: Path, tell: Callable[[str], None]
) -> list[Failure]:
    """Make every run complete that is not, `at_once` at a time.

    Args:
        later: jobs that follow these, for the estimate of the time left.
        folder: where `configs/` and `logs/` go.
    Returns:
        Runs that failed; the others are complete.
    Raises:
        Stopped: by Ctrl-C or SIGTERM; the runs under way have ended, with checkpoints.
    """
    waiting = [job for job in jobs if not is_complete(job)]
    done = len(jobs) - len(waiting)
    under_way: dict[Job, subprocess.Popen[bytes]] = {}
    slots: dict[Job, int] = {}
    failures: list[Failure] = []
    with stopping(under_way):
        while waiting or under_way:
            while waiting and len(under_way) < at_once:
                job = waiting.pop(0)
                taken = {slots[other] for other in under_way}
                slots[job] = next(slot for slot in count() if slot not in taken)
                under_way[job] = start(job, folder, slots[job])
                tell(f"  starts {job.name}: {job.config.trainer.num_iterations} iterations")
            time.sleep(POLL_S)
            for job in [job for job, process in under_way.items() if process.poll() is not None]:
                if reason := why_failed(job, under_way.pop(job).returncode, folder):
                    failures.append((job, reason))
                    tell(f"  failed {job.name}: {reason}")
                else:
                    done += 1
                    left = time_left([*jobs, *later], at_once)
                    tell(f"[{done}/{len(jobs)}] {job.name}: {in_words(job)}; about {left} left")
    return failures


def why_failed(job: Job, status: int, folder: Path) -> str | None:
    """Why a run whose process has ended is not complete, by its exit status; None where it is."""
    if status < 0:  # its last line is about something else
        name = signal.Signals(-status).name
        return f"killed by {name}{', often for lack of memory' if name == 'SIGKILL' else ''}"
    if status > 0 or not is_complete(job):
        return last_line(log_path(job, folder)) or f"exit status {status}"
    try:
        check_whole(job)
    except ConfigError as error:
        return str(error)
    return None


def start(job: Job, folder: Path, slot: int) -> subprocess.Popen[bytes]:
    """Start a run, from its latest checkpoint where it has one; Ctrl-C of the terminal does not reach it."""
    words = [sys.executable, "-m", "ngrpo_lora", "train", str(config_path(job, folder)), "--num-processes", "1"]
    if checkpoints(job.folder):
        words.append("resume=latest")
    elif job.folder.exists():
        shutil.rmtree(job.folder)  # stopped before its first checkpoint
    with written(config_path(job, folder)) as partial:
        partial.write_text(dump_config(job.config), encoding="utf-8")
    environment = dict(os.environ)
    if job.config.model.device == "cuda":  # runs are spread over all GPUs
        environment["CUDA_VISIBLE_DEVICES"] = visible_gpus()[slot % len(visible_gpus())]
    else:
        environment["OMP_NUM_THREADS"] = str(job.config.trainer.num_threads or 1)
    log = log_path(job, folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def places(device: str) -> int:
    """How many runs a device takes at once: one for each core of a CPU, one for each GPU of `cuda`, else one."""
    if device == "cpu":
        return os.cpu_count() or 1
    return len(visible_gpus()) if device == "cuda" else 1


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return given or [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def stopping(processes: dict[Job, subprocess.Popen[bytes]]) -> Iterator[None]:
    """End the processes with this block: at Ctrl-C, SIGTERM or SIGHUP after their iteration, at a second at once."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    # A shell's background job ignores SIGINT unless told; SIGHUP comes where a terminal is closed, not on Windows.
    asking = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
    previous = [signal.getsignal(one) for one in asking]

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    if in_main_thread:
        for one in asking:
            signal.signal(one, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        end(processes)
        raise Stopped("stopped; the same command goes on where it is") from None
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        if in_main_thread:
            for one, handler in zip(asking, previous, strict=True):
                signal.signal(one, handler)


def end(processes: dict[Job, subprocess.Popen[bytes]]) -> None:
    """Ask the processes to stop after their iteration, and wait for them, for a while or until Ctrl-C."""
    for process in processes.values():
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE_S
    try:
        while time.monotonic() < deadline and any(process.poll() is None for process in processes.values()):
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        return


def time_left(jobs: Sequence[Job], at_once: int) -> str:
    """The time that the jobs which are not complete will take, by what the complete ones took a forward pass."""
    complete = {job for job in jobs if is_complete(job)}
    seconds = sum(seconds_of(job) for job in complete)
    rate = seconds / sum(job.work for job in complete)
    minutes = rate * sum(job.work for job in jobs if job not in complete) / at_once / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def seconds_of(job: Job) -> float:
    """Seconds of a run with its evaluations, without what its process took to start."""
    rows = read_metrics(job.folder / "metrics.jsonl")
    return sum(value or 0.0 for row in rows for key, value in row.items() if key.startswith("time/"))


def in_words(job: Job) -> str:
    """What became of a run: its held-out reward before and after, and its minutes."""
    before, after = evaluated(job.folder)
    return f"held-out reward {before:.3f} -> {after:.3f}, {seconds_of(job) / 60:.1f} min"


def last_line(path: Path) -> str:
    """The last line of a log that is not empty."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def config_path(job: Job, folder: Path) -> Path:
    """The file that a run is started with."""
    return folder / "configs" / f"{job.name.replace('/', '-')}.yaml"


def log_path(job: Job, folder: Path) -> Path:
    """The file that keeps what a run's process prints."""
    return folder / "logs" / f"{job.name.replace('/', '-')}.log"
