"""Runs the parts of a report, each in a process of its own, within a budget; what is complete is not made again.

A part may take what is left of the budget, less what is allotted to those that still fit after it. A process that ends
before its rows are measured fails one row, and another process goes on with the next; one whose time is over is ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ngrpo_lora.bench.gpu.parts import Part
from ngrpo_lora.bench.gpu.report import page, part_table
from ngrpo_lora.bench.gpu.results import Result, opened_result, read_result, waiting, write_result
from ngrpo_lora.bench.paper.running import last_line, stopping
from ngrpo_lora.records.files import written
from ngrpo_lora.records.ownership import owned

__all__ = ["Budget", "make_report"]


class Budget:
    """Seconds that all parts have together, from now on."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, time.monotonic()

    @property
    def left_s(self) -> float:
        """What is left, never below 0."""
        return max(0.0, self.seconds - (time.monotonic() - self.start))

    def granted_s(self, parts: Sequence[Part]) -> float:
        """Seconds for the first of the parts: what is left, less what is allotted to those that fit after it.

        Returns:
            0 where not even its own allotted seconds are left.
        """
        first, *later = parts
        spare = self.left_s - first.allotted_s
        if spare < 0:
            return 0.0
        for part in later:
            if part.allotted_s <= spare:
                spare -= part.allotted_s
        return first.allotted_s + spare


def make_report(parts: Sequence[Part], folder: Path, machine: str, minutes: float, tell: Callable[[str], None]) -> bool:
    """Measure all rows that are not complete, as far as the budget goes, and write the report after every part.

    Args:
        machine: what the figures are of; those of another machine, version or configuration are measured anew.
    Returns:
        Whether every row has been tried.
    Raises:
        ConfigError: a file in the folder is not of a report.
        UserError: another process writes into the folder.
        Stopped: by Ctrl-C or SIGTERM; what is measured stays.
    """
    with owned(folder), stopping({}):
        return measure_parts(parts, folder, machine, minutes, tell)


def measure_parts(
    parts: Sequence[Part], folder: Path, machine: str, minutes: float, tell: Callable[[str], None]
) -> bool:
    """Do the work of `make_report` in a folder that is owned."""
    budget = Budget(60 * minutes)
    paths = [folder / "parts" / f"{part.name}.json" for part in parts]
    results = [opened_result(part, path, machine) for part, path in zip(parts, paths, strict=True)]
    for path, result in zip(paths, results, strict=True):
        write_result(path, result)
    open_ones = [index for index, result in enumerate(results) if waiting(result)]
    write_report(folder, results)
    for place, index in enumerate(open_ones):
        part, path = parts[index], paths[index]
        granted_s = budget.granted_s([parts[i] for i in open_ones[place:]])
        if granted_s == 0:
            tell(f"{part.title}: not started; {part.allotted_s:g} s are allotted, and {budget.left_s:.0f} s left")
            continue
        tell(f"{part.title}: at most {granted_s:.0f} s")
        measure(path, granted_s)
        results[index] = read_result(path)
        write_report(folder, results)
        tell(f"\n{part_table(results[index])}\n")
    return not any(waiting(result) for result in results)


def write_report(folder: Path, results: Sequence[Result]) -> None:
    """Write `report.json` and `report.md`, and the table of every part that has one."""
    write_result(folder / "report.json", {"parts": results})
    texts = {folder / "report.md": page(results)}
    texts |= {folder / "parts" / f"{result['part']}.md": part_table(result) for result in results}
    for path, text in texts.items():
        with written(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def measure(path: Path, granted_s: float) -> None:
    """Let processes measure what waits in a part's file, until nothing does or its time is over."""
    deadline = time.monotonic() + granted_s
    while rows := waiting(read_result(path)):
        reason = f"the part's {granted_s:.0f} s were over"
        state, log = "stopped", path.with_suffix(".log")
        with log.open("ab") as file:
            words = [sys.executable, "-m", "ngrpo_lora.bench.gpu", str(path)]
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
            try:
                status = process.wait(timeout=max(0.0, deadline - time.monotonic()))
                state, reason = "failed", f"exit status {status}, {last_line(log) or 'no message'}"
            except subprocess.TimeoutExpired:
                pass
            finally:
                end(process)
        result = read_result(path)
        left = waiting(result)
        if state == "stopped":
            for row in left:
                row["state"], row["reason"] = state, reason
        elif len(left) == len(rows):  # it has ended within its first row
            left[0]["state"], left[0]["reason"] = state, reason
        write_result(path, result)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started, where they have not ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
