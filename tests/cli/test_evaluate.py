"""`ngrpo score`, `compare`, `curves` and `report` from end to end, and what they refuse before a model loads."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import refuse
from conftest import MakeConfig
from PIL import Image
from report_runs import write_run
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.evaluation import comparison, judging, statistics
from ngrpo_lora.records.ownership import owned
from ngrpo_lora.reports.grids import CELL_PX, LINE_PX
from ngrpo_lora.sampling import sampler
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.world.edits import EDIT_TASKS, parse_edit, split_edits

RED = "import numpy as np\n\ndef red(images):\n    return [float(np.asarray(i)[..., 0].mean()) for i in images]\n"


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def red(tmp_path: Path) -> str:
    (tmp_path / "red.py").write_text(RED)
    return f"{tmp_path / 'red.py'}:red"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of different redness; the one in the middle of the order is the reddest."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, value in (("a", 50), ("b", 200), ("c", 100)):
        Image.new("RGB", (8, 8), (value, 0, 0)).save(folder / f"{name}.png")
    return folder


def test_pictures_are_scored_into_a_table_files_and_a_sheet_with_the_best_first(red: str, folder: Path, tmp_path: Path):
    out = tmp_path / "new" / "scores"
    printed = run("score", folder, folder / "a.png", "--reward", red, "--output", out)
    values = [50.0, 200.0, 100.0, 50.0]
    expected = statistics.mean_interval(values, range(4))
    assert f"| red | {expected.show()} | 4 | 0 |" in printed
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["picture"]).name, float(row["red"])) for row in rows] == [
        (name, value) for name, value in zip(("a.png", "b.png", "c.png", "a.png"), values, strict=True)
    ]
    saved = json.loads((out / "scores.json").read_text())
    assert saved["rewards"] == [{"reward": "red", **vars(expected), "failed": 0}]
    sheet = np.asarray(Image.open(out / "contact_sheet.png"))
    assert sheet.shape[0] == CELL_PX + 3 * LINE_PX
    assert [int(sheet[CELL_PX // 2, column * CELL_PX + CELL_PX // 2, 0]) for column in range(4)] == [200, 100, 50, 50]


def test_several_rewards_are_added_up_as_in_training_and_failures_come_last(folder: Path, tmp_path: Path):
    (tmp_path / "more.py").write_text(
        RED + "def dark(image):\n    red = float(np.asarray(image)[0, 0, 0])\n"
        "    return float('nan') if red == 200 else -1e4 * red\n"
    )
    reward = f"{{name: '{tmp_path}/more.py:red', weight: -1}}"
    out = tmp_path / "scores"
    words = ["score", folder, "--reward", reward, "--reward", f"{tmp_path}/more.py:dark", "--output", out]
    assert "| dark | -750000.000 [" in run(*words, "--prompt", "a square")
    sheet = np.asarray(Image.open(out / "contact_sheet.png"))
    assert [int(sheet[CELL_PX // 2, column * CELL_PX + CELL_PX // 2, 0]) for column in range(3)] == [50, 100, 200]
    with (out / "scores.csv").open() as file:
        assert [row["dark"] for row in csv.DictReader(file)] == ["-500000.0", "", "-1000000.0"]


def test_what_sample_draws_brings_its_prompt_along(tmp_path: Path):
    drawn, out = tmp_path / "samples", tmp_path / "scores"
    run("sample", "--prompt", "a red star", "--prompt", "a photo of a blue heart", "--output", drawn)
    run("score", drawn, "--reward", "world", "--output", out)
    rows = json.loads((out / "scores.json").read_text())["pictures"]
    assert [row["prompt"] for row in rows] == ["a red star", "a photo of a blue heart"]
    assert all(0 <= row["world"] <= 1 for row in rows)


def test_a_grid_is_scored_cell_by_cell(red: str, tmp_path: Path):
    sheet = Image.new("RGB", (20, 10))
    sheet.paste((90, 0, 0), (10, 0, 20, 10))
    sheet.save(tmp_path / "grid.png")
    run("score", tmp_path / "grid.png", "--grid", "1x2", "--reward", red, "--output", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["pictures"]
    assert [row["red"] for row in rows] == [0, 90]


def test_a_finished_run_is_told_before_and_after(finished_run, tmp_path: Path):
    printed = run("score", finished_run.output_dir, "--output", tmp_path / "out")
    files = sorted((finished_run.output_dir / "evaluations").glob("*.jsonl"))
    first, last = (
        [json.loads(line)["redness"] for line in file.read_text().splitlines()] for file in (files[0], files[-1])
    )
    name = finished_run.output_dir.name
    assert f"| {name} @ 4 | @ 0 | redness | {np.mean(first):.3f} | {np.mean(last):.3f} |" in printed
    assert (tmp_path / "out" / f"{name}.csv").is_file()


def test_a_runs_measures_are_told_below_its_scores(finished_run, tmp_path: Path):
    assert "| measure |" not in run("score", finished_run.output_dir, "--output", tmp_path / "out")
    measured = tmp_path / "measured"
    shutil.copytree(finished_run.output_dir / "evaluations", measured / "evaluations")
    lines = [json.loads(line) for line in (finished_run.output_dir / "metrics.jsonl").open()]
    for line, bits in zip((lines[0], lines[-1]), (2.5, 1.25), strict=True):
        line["eval/hue_bits"] = bits
    (measured / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = run("score", measured, finished_run.output_dir, "--output", tmp_path / "out")
    assert printed.count("| measured | hue_bits | 2.500 | 1.250 | -1.250 |") == 1
    assert printed.index("| redness |") < printed.index("| measure |")


def test_an_adapter_is_compared_with_its_base_and_nothing_is_drawn_twice(
    finished_run, red: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, label = tmp_path / "out", finished_run.output_dir.name
    words = ["compare", finished_run.output_dir, "--num-prompts", "3", "--seeds", "2", "--seed", "7", "--output", out]
    printed = run(*words, "--reward", red)
    results = json.loads((out / "results.json").read_text())
    before, after = ([row["scores"][who]["red"] for row in results["pictures"]] for who in ("base", label))
    prompts = [row["prompt"] for row in results["pictures"]]
    assert [row["seed"] for row in results["pictures"]] == [7, 8, 9, 10, 11, 12]
    assert prompts[0::2] == prompts[1::2]
    assert len(set(prompts)) == 3
    for row, base, tuned in zip(results["pictures"], before, after, strict=True):
        for file, score in ((row["files"]["base"], base), (row["files"][label], tuned)):
            assert np.asarray(Image.open(out / file))[..., 0].mean() == pytest.approx(score, rel=1e-12)
    assert before != after  # the adapter does something
    (expected,) = statistics.compare_scores(label, {"red": after}, "base", {"red": before}, prompts)
    assert statistics.differences_table([expected]) in printed
    assert results["differences"] == [json.loads(json.dumps(comparison.asdict(expected)))]
    assert not math.isnan(expected.difference.low)
    with (out / "results.csv").open() as file:
        assert [float(row["red"]) for row in csv.DictReader(file)] == before + after
    for page in ("side_by_side.html", "blind.html"):
        assert (out / page).stat().st_size > 20_000

    monkeypatch.setattr(sampler, "load_fused", lambda config: pytest.fail("a model was loaded"))
    assert "| world_strict |" in run(*words, "--reward", "world_strict")
    again = json.loads((out / "results.json").read_text())
    assert again["comparison"] == results["comparison"]  # so votes go on
    assert again["rewards"] == ["world_strict"]


def test_an_adapter_of_the_model_that_edits_is_compared_on_edits(make_config: MakeConfig, tmp_path: Path):
    settings = ["model.path=embedded-edit", "prompts.train=edits:train", "prompts.held_out=edits:held_out"]
    settings += ["evaluation.strict=world_edit_strict"]
    complete(prepare(make_config(tmp_path / "run", *settings, "trainer.num_iterations=1", "rewards=world_edit")))
    words = ["--num-prompts", "2", "--seeds", "1", "--reward", "world_edit", "--output", tmp_path / "out"]
    assert "| world_edit |" in run("compare", tmp_path / "run", *words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    drawn = [parse_edit(row["prompt"]) for row in results["pictures"]]
    assert {edit.meaning for edit in drawn} <= {edit.meaning for task in EDIT_TASKS for edit in split_edits(task)[1]}
    assert all((tmp_path / "out" / row["source"]).is_file() for row in results["pictures"])


def test_votes_are_counted_without_anything_else(tmp_path: Path):
    vote = {"label": "new", "reference": "base", "prompt": "p", "seed": 0, "choice": "label"}
    (tmp_path / "votes.json").write_text(json.dumps({"format": "ngrpo-votes-1", "comparison": "a", "votes": [vote]}))
    assert "| new | base | 100% [21%, 100%] | 1 | 0 | 0 |" in run("compare", "--votes", tmp_path / "votes.json")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            "score gone.png -r world",
            "SOURCE must be a picture, a folder of them, or a run, but 'gone.png' is not there",
        ),
        (
            "score empty -r world",
            "SOURCE must hold pictures (.bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp), but 'empty'",
        ),
        ("score text.png -r world", "'text.png' must be a readable image"),
        ("score torn.png -r world", "'torn.png' must be a readable image"),
        ("score pictures", "--reward must be given"),
        ("score pictures -r wrld", "--reward name must be one of"),
        ("score pictures -r world", "--reward world needs the prompt of every picture, but 'pictures/a.png' has none"),
        ("score pictures -r group.py:score", "--reward group judges whole groups of candidates"),
        ("score pictures -r world -p x --grid 3x2", "--grid 3x2 (rows x columns) must divide the picture"),
        ("score pictures -r world -p x --grid 3", "--grid must be ROWSxCOLUMNS, for example 4x3, got '3'"),
        ("score pictures -r world -p x --device tpu", "--device must be auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
        ("score pictures -r world -p x --output text.png", "--output must be a writable folder, got 'text.png'"),
        ("score bad -r world", "metadata.jsonl must hold lines like"),
        ("score run", "must be a run with a first and a later evaluation, but 'run' has 0 of them"),
        ("score run -r world", "got the run 'run' with --reward"),
        ("score run pictures", "got the run 'run' with pictures"),
        ("compare", "ADAPTER and --reward must be given"),
        ("compare gone -r world", "ADAPTER must be a LoRA file, a run's folder or a repository of the Hub"),
        ("compare text.png -r world", "adapter 'text.png' is no readable safetensors file"),
        ("compare text.png -r wrld", "--reward name must be one of"),
        ("compare text.png -r world --prompts gone.txt", "--prompts"),
        ("compare text.png -r world --device tpu", "--device must be"),
        ("compare --votes text.png", "--votes must be a file that blind.html saved"),
    ],
)
def test_bad_input_is_one_clear_line(words: str, part: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sampler, "load_fused", lambda config: pytest.fail("a model was loaded"))
    monkeypatch.setattr(judging, "Scorer", lambda *_: pytest.fail("a reward was loaded"))
    for name in ("empty", "run", "bad"):
        Path(name).mkdir()
    Path("run/metrics.jsonl").touch()
    Path("text.png").write_text("no picture")
    Path("group.py").write_text("def score(images, prompt):\n    return [0.0] * len(images)\n")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("torn.png")
    Path("torn.png").write_bytes(Path("torn.png").read_bytes()[:2000])
    Image.new("RGB", (8, 8)).save("bad/a.png")
    Path("bad/metadata.jsonl").write_text('{"file_name": "a.png", "prompt": 3}\n')
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert part in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--seeds", "--num-prompts"])
def test_counts_start_at_1(option: str):
    result = CliRunner().invoke(app, ["compare", "a", "-r", "world", option, "0"])
    assert result.exit_code == 2
    assert result.output == f"ngrpo: {option} must be at least 1, got 0\n"


# Curves -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_heavy")
def test_curves_prints_a_table_and_draws_the_curves(tmp_path: Path):
    for name, after in (("one", 0.75), ("two", 0.5)):
        rows = [
            {"step": 0, "eval/reward_mean": 0.25, "eval/strict_accuracy": 0.1, "time/evaluation_s": 30.0},
            {"step": 1, "time/rollout_s": 60.0, "time/update_s": 30.0},
            {"step": 2, "eval/reward_mean": after, "eval/strict_accuracy": after / 2, "time/evaluation_s": None},
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = tmp_path / "new" / "curves.png"
    result = CliRunner().invoke(app, ["curves", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(curves)])
    assert result.exit_code == 0, result.output
    assert "| one | 2 | 2.0 | 0.250 → 0.750 | 10.0% → 37.5% |" in result.stdout
    assert "| two | 2 | 2.0 | 0.250 → 0.500 | 10.0% → 25.0% |" in result.stdout
    assert Image.open(curves).size[0] > 500


@pytest.mark.usefixtures("nothing_heavy")
@pytest.mark.parametrize("command", ["curves", "report"])
def test_curves_and_reports_need_runs(command: str, tmp_path: Path):
    assert "holds no metrics.jsonl" in refuse(command, str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/rew')  # killed in the first evaluation's line
    assert "has no metrics yet" in refuse(command, str(tmp_path))


@pytest.mark.usefixtures("nothing_heavy")
def test_reports_of_one_run_and_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, two = (write_run(tmp_path / name).folder for name in ("one", "two"))
    assert run("report", one) == f"report: {one / 'report.html'}\n"
    assert "finished, 10 iterations" in (one / "report.html").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run("report", one, two) == "report: report.html\n"
    assert '<h1 dir="auto">2 runs</h1>' in (tmp_path / "report.html").read_text(encoding="utf-8")
    run("report", two, "--output", "new/page.html")
    assert (tmp_path / "new" / "page.html").is_file()
    assert "--output must be a file" in refuse("report", one, "--output", two)
    with owned(two):
        run("report", two)
    assert "running, iteration 10 of 10" in (two / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("nothing_heavy")
def test_the_report_of_a_run_that_was_killed_says_that_it_has_stopped(tmp_path: Path):
    folder = write_run(tmp_path / "run", iterations=4).folder
    (folder / "report.html").write_text("running, iteration 4 of 10")
    (folder / ".lock").touch()  # both stay where a process is killed, and the system has released the lock
    (folder / ".owner.json").write_text('{"process": 1, "machine": "a", "since": "2025-01-01 00:00:00"}')
    run("report", folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "stopped after iteration 4 of 10" in page
    assert "running, iteration" not in page
