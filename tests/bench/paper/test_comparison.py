"""The command from end to end, on the embedded model, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import refuse, run
from paper_runs import jobs_of, leave, small_plan

from ngrpo_lora.bench.paper import comparison, running, search
from ngrpo_lora.bench.paper.comparison import compare, open_folder, write_report
from ngrpo_lora.bench.paper.methods import METHODS
from ngrpo_lora.bench.paper.plan import Job, search_job
from ngrpo_lora.bench.paper.running import Stopped
from ngrpo_lora.errors import ConfigError, UserError

TINY = (
    *("--quick", "--budget", 37, "--at-once", 2, "--device", "cpu"),
    *("--method", "neighbor-dpmpp-8", "--method", "flow-grpo"),
    *("rollout.prompts_per_iteration=1", "rollout.group_size=4", "evaluation.num_prompts=12", "lora.rank=2"),
)


def test_two_methods_from_end_to_end(tmp_path: Path):
    folder = tmp_path / "out"
    lines = run("bench", "paper", *TINY, "--output-dir", folder)
    assert lines[0].startswith("2 methods: 0 runs of the search and 2 of the tables, 0 of them complete")
    assert [line[:5] for line in lines if line.startswith("[")] == ["[1/2]", "[2/2]"]
    assert any("] runs/flow-grpo/seed-0: held-out reward" in line for line in lines)
    results = json.loads((folder / "results.json").read_text())
    neighbor, flow = results["outcomes"]
    assert results["dearer_than_foreseen"] == []
    assert flow["iterations"] == neighbor["iterations"] == 1
    assert neighbor["evaluations"]["0"] == flow["evaluations"]["0"]  # the same base, prompts and noises
    assert neighbor["nfe_old"] >= 8
    assert flow["nfe_old"] == 10
    assert {file.name for file in folder.glob("*.png")} == {"figure-5.png", "figure-8.png", "figure-9.png"}
    made = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}
    again = run("bench", "paper", *TINY, "--output-dir", folder)
    assert "2 of them complete" in again[0]
    assert made == {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}
    other = [word if word != "lora.rank=2" else "lora.rank=4" for word in TINY]
    assert "lora.rank: 2 -> 4" in refuse_after(other, folder)


def refuse_after(words: Sequence[object], folder: Path) -> str:
    """The message of a command that says what it does before it is refused."""
    from typer.testing import CliRunner

    from ngrpo_lora.cli import app

    result = CliRunner().invoke(app, ["bench", "paper", *map(str, words), "--output-dir", str(folder)])
    assert result.exit_code == 2
    return result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "neighbour"], "--method must be one of"),
        (["--table", 9], "--table must be one of 1, 2, 3, 4, 5, 6, 7, 8, got 9"),
        (["--seeds", 0], "--seeds must be from 1 to 100, got 0"),
        (["--at-once", 0], "--at-once must be at least 1"),
        (["--quick", "--full"], "must not be given together"),
        (["evaluation.num_prompts=3"], "evaluation.num_prompts must be at least 12"),
        (["--device", "tpu"], "--device must be"),
        (
            ["--budget", 36, "--method", "flow-grpo"],
            "one of flow-grpo costs 37 forward passes per sample, got 36; raise",
        ),
        (["prompts.held_out=nowhere.txt"], "prompts.held_out"),
        (["rewards=nowhere.py:score"], "nowhere.py"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(words: list[object], message: str, tmp_path: Path):
    folder = tmp_path / "out"
    assert message in refuse("bench", "paper", *words, "--output-dir", folder)
    assert not folder.exists()


def test_a_folder_of_another_version_or_purpose_is_refused(tmp_path: Path):
    open_folder(tmp_path / "new")
    open_folder(tmp_path / "new")
    (tmp_path / "new" / comparison.MARK).write_text('{"version": "0.0.1"}')
    with pytest.raises(ConfigError, match=r"results of this version \(.*\), but .* has those of 0.0.1"):
        open_folder(tmp_path / "new")
    for damaged in ("[1]", "xx", "{}"):
        (tmp_path / "new" / comparison.MARK).write_text(damaged)
        with pytest.raises(ConfigError, match="has those of an unknown one, as comparison.json is damaged"):
            open_folder(tmp_path / "new")
    with pytest.raises(ConfigError, match="must be empty, new, or of an earlier"):
        open_folder(tmp_path)


def test_a_folder_of_other_algorithms_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    open_folder(tmp_path / "new")
    monkeypatch.setattr(comparison, "algorithms_digest", lambda: "another")
    with pytest.raises(ConfigError, match="must hold results of these algorithms, but the code of some has changed"):
        open_folder(tmp_path / "new")


def test_the_digest_is_of_what_the_algorithms_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "algorithms"
    shutil.copytree(comparison.algorithms.__path__[0], package)
    monkeypatch.setattr(comparison.algorithms, "__path__", [str(package)])
    first, file = comparison.algorithms_digest(), package / "neighbor.py"
    file.write_text("# a comment\n" + file.read_text())
    assert comparison.algorithms_digest() == first
    file.write_text(file.read_text() + "\nX = 1\n")
    assert comparison.algorithms_digest() != first


def test_a_stopped_comparison_reports_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = small_plan(tmp_path, "flow-grpo", budget=400.0, seeds=2)
    monkeypatch.setattr(comparison, "length", lambda config, budget: (10, 40.0))
    jobs = jobs_of(plan)
    open_folder(tmp_path)
    leave(jobs[0], lambda picture, step: 0.5)

    def stop(*_: object) -> None:
        raise Stopped("stopped")

    monkeypatch.setattr(comparison, "run_all", stop)
    with pytest.raises(Stopped):
        compare(plan, 1, ["ngrpo"], lambda line: None)
    assert "1 of 2 runs are complete" in (tmp_path / "results.md").read_text()


def test_what_stops_it_between_two_runs_stops_it_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = small_plan(tmp_path, "flow-grpo", budget=400.0)
    monkeypatch.setattr(comparison, "run_all", lambda *_: [])
    monkeypatch.setattr(comparison, "write_report", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="the same command goes on"):
        compare(plan, 1, ["ngrpo"], lambda line: None)


def test_two_commands_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = small_plan(tmp_path, "flow-grpo", budget=400.0)

    def again(*_: object) -> list[running.Failure]:
        with pytest.raises(UserError, match=rf"{tmp_path.name}' is in use .*wait for it or end it, or give another"):
            compare(plan, 1, ["ngrpo"], lambda line: None)
        return []

    monkeypatch.setattr(comparison, "run_all", again)
    compare(plan, 1, ["ngrpo"], lambda line: None)


def test_a_run_of_other_settings_is_not_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = small_plan(tmp_path, "flow-grpo", budget=400.0)
    other = jobs_of(small_plan(tmp_path, "flow-grpo", budget=400.0, settings=("lora.rank=4",)))
    leave(other[0], lambda picture, step: 0.5)
    write_report(plan, [], jobs_of(plan), ["ngrpo"], 1)
    assert not (tmp_path / "results.md").exists()


def test_the_tables_runs_have_the_winners_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = small_plan(tmp_path, "flow-grpo", profile="default", budget=400.0)
    monkeypatch.setattr(comparison, "length", lambda config, budget: (10, 40.0))
    open_folder(tmp_path)
    method = next(method for method in METHODS if method.name == "flow-grpo")
    rewards = {"1e-4": 0.4, "3e-4": 0.5, "1e-3": 0.5, "3e-3": 0.6, "1e-2": 0.3}
    made: list[str] = []

    def run_all(jobs: list[Job], *_: object) -> list[running.Failure]:
        new = [job for job in jobs if not running.is_complete(job)]
        made.extend(job.name.removeprefix("search/flow-grpo/") for job in new)
        for job in (job for job in new if job.name.startswith("search")):
            rate, clip = job.point
            leave(job, lambda picture, step, rate=rate, clip=clip: rewards[rate] + 0.1 * (clip == "1e-4"))
        return [(job, "no") for job in new if job.name.startswith("runs")]

    monkeypatch.setattr(comparison, "run_all", run_all)
    with pytest.raises(UserError, match=r"1 of 8 runs failed, the first of them runs/flow-grpo/seed-0 \(no\)"):
        compare(plan, 1, ["ngrpo"], lambda line: None)
    assert made == [
        *(f"rate-{rate}-clip_range-1e-3" for rate in ("3e-4", "1e-3", "3e-3", "1e-2")),
        "rate-3e-3-clip_range-1e-4",
        *(f"rate-{rate}-clip_range-1e-4-whole" for rate in ("1e-3", "3e-3")),
        "runs/flow-grpo/seed-0",
    ]
    assert search.tuned(plan, search.jobs(plan, comparison.length)) == {"flow-grpo": ("3e-3", "1e-4")}
    assert search_job(plan, method, ("3e-3", "1e-4"), comparison.length).folder.is_dir()


def test_a_point_of_the_search_that_fails_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = small_plan(tmp_path, "flow-grpo", profile="default", budget=400.0)
    monkeypatch.setattr(comparison, "length", lambda config, budget: (10, 40.0))
    tried: list[tuple[str, str]] = []

    def run_all(jobs: list[Job], *_: object) -> list[running.Failure]:
        tried.extend(job.point for job in jobs)
        failed = [job for job in jobs if job.point[0] == "3e-3" or job.name.startswith("runs")]
        for job in jobs:
            if job not in failed:
                leave(job, lambda picture, step: 0.5)
        return [(job, "diverged") for job in failed]

    monkeypatch.setattr(comparison, "run_all", run_all)
    with pytest.raises(UserError, match=r"2 of 7 runs failed, .*rate-3e-3-clip_range-1e-3 \(diverged\)"):
        compare(plan, 1, ["ngrpo"], lambda line: None)
    assert [rate for rate, _ in tried] == ["3e-4", "1e-3", "3e-3", *["1e-4"] * 4]
