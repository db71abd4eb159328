"""Runs as processes: skipped when complete, resumed, refused with other settings, stopped, and failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from paper_runs import jobs_of, leave, small_plan

from ngrpo_lora.bench.paper import running
from ngrpo_lora.bench.paper.plan import Job
from ngrpo_lora.bench.paper.running import Stopped, check_folders, last_line, places, run_all, start, time_left
from ngrpo_lora.config import load_config
from ngrpo_lora.errors import ConfigError, UserError

WORKS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
time.sleep({seconds})
Path({mark!r}).open("a").write({name!r} + "\\n")
from paper_runs import jobs_of, leave, small_plan
job = next(job for job in jobs_of(small_plan(Path({folder!r}), budget=400.0)) if job.name == {name!r})
leave(job, lambda picture, step: 0.5)
"""
TESTS = str(Path(__file__).parents[2])


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str = WORKS, seconds: float = 0.0) -> Path:
    """Let other processes take the place of training; returns the file in which they say that they have run."""
    mark = folder / "ran.txt"

    def start(job: Job, output: Path, slot: int) -> subprocess.Popen[bytes]:
        values = {"tests": TESTS, "folder": str(folder), "name": job.name, "mark": str(mark), "seconds": seconds}
        log = running.log_path(job, output)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            return subprocess.Popen([sys.executable, "-c", code.format(**values)], stdout=file, stderr=file)

    monkeypatch.setattr(running, "start", start)
    return mark


def test_complete_runs_are_skipped_and_the_others_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mark, told = pretend(monkeypatch, tmp_path), []
    jobs = jobs_of(small_plan(tmp_path, budget=400.0))
    leave(jobs[0], lambda picture, step: 0.5)
    assert run_all(jobs, 2, [], tmp_path, told.append) == []
    assert mark.read_text().splitlines() == [jobs[1].name]
    assert told[-1].startswith(f"[2/2] {jobs[1].name}: held-out reward 0.500 -> 0.500")
    assert told[-1].endswith("about 0 min left")
    mark.unlink()
    assert run_all(jobs, 2, [], tmp_path, told.append) == []
    assert not mark.exists()


def test_a_failed_run_leaves_the_others_alone_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, tmp_path, "if 'flow' in {name!r}: raise SystemExit('out of paint')\n" + WORKS)
    neighbor, flow = jobs_of(small_plan(tmp_path, budget=400.0))
    assert run_all([flow, neighbor], 1, [], tmp_path, lambda line: None) == [(flow, "out of paint")]
    assert running.is_complete(neighbor)


def test_a_run_that_is_killed_is_told_apart_from_what_it_printed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "import os, signal; print('3/40 reward 0.5', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    pretend(monkeypatch, tmp_path, code)
    job = jobs_of(small_plan(tmp_path, budget=400.0))[0]
    assert run_all([job], 10**9, [], tmp_path, lambda line: None) == [
        (job, "killed by SIGKILL, often for lack of memory")
    ]


def test_a_run_that_ends_with_a_part_of_its_metrics_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where lines were lost before it was resumed: what it spent would be counted short."""
    loses = "\npath = job.folder / 'metrics.jsonl'\nlines = path.read_text().splitlines(True)\n"
    pretend(monkeypatch, tmp_path, WORKS + loses + "path.write_text(''.join(lines[:1] + lines[3:]))\n")
    job = jobs_of(small_plan(tmp_path, budget=400.0))[0]
    ((failed, reason),) = run_all([job], 1, [], tmp_path, lambda line: None)
    assert failed is job
    assert "some lines of metrics.jsonl, files of evaluations/ or config.yaml are missing" in reason


def test_a_run_that_another_process_still_makes_is_left_alone(tmp_path: Path):
    job = jobs_of(small_plan(tmp_path, budget=400.0))[0]
    code = """
import sys
from pathlib import Path
from ngrpo_lora.records.ownership import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    input()
"""
    words = [sys.executable, "-c", code, str(job.folder)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"owned\n"
    with pytest.raises(UserError, match=rf"seed-0' is in use \(process {other.pid} on .*wait for it or end it"):
        check_folders([job])
    other.communicate(b"\n")
    check_folders([job])


def test_ctrl_c_lets_runs_end_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    patient = """
import signal, time, pathlib
def stop(*_):
    pathlib.Path({mark!r}).write_text("ended well")
    raise SystemExit(2)
signal.signal(signal.SIGINT, stop)
pathlib.Path({mark!r}).write_text("begun")
time.sleep(60)
"""
    mark = pretend(monkeypatch, tmp_path, patient)
    jobs = jobs_of(small_plan(tmp_path, budget=400.0))

    def interrupt() -> None:
        while not (mark.exists() and mark.read_text() == "begun"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        thread.start()
        with pytest.raises(Stopped, match="the same command goes on"):
            run_all(jobs, 1, [], tmp_path, lambda line: None)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert mark.read_text() == "ended well"


def test_a_run_goes_on_from_its_checkpoint_or_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    called: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: called.append(words))
    job = jobs_of(small_plan(tmp_path, budget=400.0))[0]
    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").write_text("of a run that was killed before its first checkpoint")
    start(job, tmp_path, 0)
    assert not job.folder.exists()
    assert "resume=latest" not in called[0]
    checkpoint = job.folder / "checkpoints" / "iteration-000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").write_bytes(b"")
    start(job, tmp_path, 0)
    assert called[1] == [*called[0], "resume=latest"]
    assert checkpoint.exists()
    assert called[0][1:4] == ["-m", "ngrpo_lora", "train"]
    assert load_config(called[0][4]) == job.config


def test_a_run_with_other_settings_is_refused(tmp_path: Path):
    job = jobs_of(small_plan(tmp_path, budget=400.0))[0]
    leave(job, lambda picture, step: 0.5)
    check_folders([job])
    other = jobs_of(small_plan(tmp_path, budget=400.0, settings=("lora.rank=4",)))[0]
    with pytest.raises(ConfigError, match=r"lora.rank: 16 -> 4.*; give another --output-dir"):
        check_folders([other])
    (job.folder / "config.yaml").write_text("lora: {rnak: 4}")
    with pytest.raises(ConfigError, match="is not of this version"):
        check_folders([job])


def test_the_time_left_follows_from_what_complete_runs_took(tmp_path: Path):
    first, second = jobs_of(small_plan(tmp_path, "neighbor-dpmpp-8", budget=400.0, seeds=2))
    leave(first, lambda picture, step: 0.5)  # 40 iterations of 1.75 s
    assert time_left([first, second], 1) == "1 min"
    assert time_left([first, *[second] * 100], 1) == "1.9 h"
    assert time_left([first, *[second] * 100], 2) == "58 min"


def test_the_last_line_of_a_log_is_one_that_says_something(tmp_path: Path):
    (tmp_path / "log").write_text("first\nngrpo: no\n\n")
    assert last_line(tmp_path / "log") == "ngrpo: no"


def test_every_core_has_a_run_and_any_other_device_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert (places("cpu"), places("cuda"), places("cuda:1"), places("mps")) == (3, 2, 1, 1)
