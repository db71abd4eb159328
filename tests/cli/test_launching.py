"""`ngrpo train` as several processes: how many, how they are stopped, and which of them was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from runs import SEVERAL, TROUBLE, read_rows

from ngrpo_lora.cli.launching import process_count
from ngrpo_lora.errors import UserError


def command(count: int, output_dir: Path, make_config: MakeConfig, *overrides: str) -> list[str]:
    """`ngrpo train` of a file with these settings, as several processes."""
    from ngrpo_lora.config import dump_config

    file = output_dir.with_suffix(".yaml")
    file.write_text(dump_config(make_config(output_dir, *SEVERAL, "trainer.num_threads=1", *overrides)))
    return [sys.executable, "-m", "ngrpo_lora", "train", str(file), "--num-processes", str(count)]


def test_the_command_starts_the_processes_and_ctrl_c_stops_them_after_an_iteration(
    make_config: MakeConfig, tmp_path: Path
):
    words = command(2, tmp_path / "run", make_config, "trainer.num_iterations=200", "evaluation.every=200")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and len(read_rows(tmp_path / "run")) > 1):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # what the terminal does: to every process
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.count("go on with resume=latest") == 1
    steps = [row["step"] for row in read_rows(tmp_path / "run")]
    assert (tmp_path / "run" / "checkpoints" / f"iteration-{steps[-1]:06d}").is_dir()
    assert "Traceback" not in stderr


def test_a_killed_process_is_named_by_the_command(make_config: MakeConfig, tmp_path: Path):
    (tmp_path / "trouble.py").write_text(TROUBLE.format("os.kill(os.getpid(), 9)"))
    (tmp_path / "trouble.txt").write_text("now")
    words = command(2, tmp_path / "run", make_config, f"rewards.train={tmp_path / 'trouble.py'}:score")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "process 1 of 2 was killed (SIGKILL, often for lack of memory)" in done.stderr
    assert "process 0 of 2 lost another process" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert process_count("auto", None) == 2
    assert process_count("cuda", 1) == 1
    assert process_count("cuda:1", None) == 1
    assert process_count("cpu", 4) == 4
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert [process_count("cpu", None, on_cpu) for on_cpu in (1, 2, 5)] == [1, 2, 3]
    with pytest.raises(UserError, match=r"--num-processes must be at most the number of GPUs \(2\)"):
        process_count("auto", 3)
