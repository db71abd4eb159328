"""What a comparison leaves: results, a page that loads nothing, and pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from paper_runs import PROMPTS, jobs_of, leave, small_plan
from PIL import Image

from ngrpo_lora.bench.paper import figures, report, search
from ngrpo_lora.bench.paper.outcomes import read


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(figures, "draw_groups", lambda path, labelled: Image.new("RGB", (8, 8)).save(path))
    plan = small_plan(tmp_path, budget=400.0, seeds=2)
    jobs = jobs_of(plan)
    for job in jobs[:-1]:
        leave(job, lambda picture, step: 0.5 + 0.01 * step)
    tuning = search.write(plan, [], search.tuned(plan, []))
    report.write(plan, read(jobs), tuning, ["ngrpo", "bench", "paper"], len(jobs), 2)
    return tmp_path


def test_the_page_is_one_file_that_loads_nothing(folder: Path):
    page = (folder / "index.html").read_text()
    assert len(re.findall(r"<img src=\"data:image/webp;base64,", page)) == len(re.findall("<img", page)) == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert not re.search("<(script|link)|url\\(", page)
    assert "default-src 'none'" in page
    assert "<td>Flow-GRPO</td>" in page


def test_results_say_how_they_came_about(folder: Path):
    results = json.loads((folder / "results.json").read_text())
    assert results["command"] == "ngrpo bench paper"
    assert results["seeds"] == [0, 1]
    assert (results["complete_runs"], results["runs"]) == (3, 4)
    assert results["dearer_than_foreseen"] == []
    assert set(results["versions"]) >= {"ngrpo-lora", "torch", "python"}
    assert [outcome["name"] for outcome in results["outcomes"]] == [
        "runs/neighbor-dpmpp-8/seed-0",
        "runs/flow-grpo/seed-0",
        "runs/neighbor-dpmpp-8/seed-1",
    ]
    assert [results["tables"][index]["rows"][0][0] for index in (0, 1)] == [
        "better than Flow-GRPO (10 steps), all tasks",
        "base model",
    ]
    assert results["machine"]["runs_at_once"] == 2
    text = (folder / "results.md").read_text()
    assert "3 of 4 runs are complete" in text
    assert "## Table 3" in text


def test_a_run_that_was_dearer_than_foreseen_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "draw_groups", lambda path, labelled: Image.new("RGB", (8, 8)).save(path))
    plan = small_plan(tmp_path, "flow-grpo", budget=400.0)
    jobs = jobs_of(plan)
    leave(jobs[0], lambda picture, step: 0.5)
    metrics = jobs[0].folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"nfe/theta_per_sample": 1.0', '"nfe/theta_per_sample": 3.0'))
    report.write(plan, read(jobs), [], ["ngrpo"], 1, 1)
    assert "more than an iteration's: runs/flow-grpo/seed-0." in (tmp_path / "results.md").read_text()


def test_the_pictures_of_all_methods_stand_in_one_row_a_prompt(folder: Path):
    grid = Image.open(folder / "figure-9.png").convert("RGB")
    columns, rows = 3, 2  # the base and two methods, two prompts
    assert grid.width == columns * 160
    cell = grid.height // rows
    middles = [[grid.getpixel((160 * c + 80, cell * r + 80)) for c in range(columns)] for r in range(rows)]
    assert middles == [[(128, 128, 128), (255, 0, 0), (255, 0, 0)]] * rows
    assert len(PROMPTS) > rows
