"""What the report of one run says."""

from __future__ import annotations

import re

import pytest
from conftest import MakeConfig
from PIL import Image

from ngrpo_lora.evaluation.report import comparison, health, sections
from ngrpo_lora.evaluation.report.record import Record
from ngrpo_lora.evaluation.statistics import share_interval
from ngrpo_lora.records.files import digest
from ngrpo_lora.records.pictures import save_png


def cells(html: str) -> list[list[str]]:
    """The rows of a table, without its head."""
    found = [re.findall(r'<td dir="auto">(.*?)</td>', row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    return [row for row in found if row]


def test_accuracy_is_told_by_task_with_intervals(write_run):
    rows = cells(sections.accuracy_by_task(write_run()))
    assert [row[:2] for row in rows] == [["color", "2"], ["other prompts", "2"], ["all", "4"]]
    everything = rows[-1]
    groups = [0, 1, 2, 2]
    assert everything[2] == share_interval([1, 0, 0, 0], groups).show(".0%")
    assert everything[3] == share_interval([1, 1, 1, 0], groups).show(".0%")
    assert everything[4].startswith("+50% [")


def test_prompts_of_another_world_are_one_row(write_run):
    record = write_run()
    assert record.pairs is not None
    record.pairs.prompts[:] = ["a cat", "a dog", "a cow", "a hen"]
    assert [row[0] for row in cells(sections.accuracy_by_task(record))] == ["all"]


def test_sliders_have_both_pictures_their_scores_and_a_name_for_the_keyboard(write_run):
    page = sections.before_and_after(write_run())
    assert page.count('<input type="range"') == page.count('<div class="over">') == 2
    assert "seed 7 · world 0.25 → 0.75" in page
    assert 'aria-label="before and after: a red star"' in page


def test_an_edit_is_shown_beside_its_source(write_run):
    record = write_run()
    assert "edited from" not in sections.before_and_after(record)
    (sources := record.folder / "samples" / "sources").mkdir()
    for i, prompt in ((0, record.shown[0].prompt), (2, "of another run")):
        save_png(sources / f"{i}.png", Image.new("RGB", (64, 64), "green"), {"prompt": prompt, "seed": "7"})
    again = Record.read(record.folder, record.config, is_running=False)
    page = sections.before_and_after(again)
    assert page.count("edited from") == page.count('alt="source: a red star"') == 1
    both = comparison.pictures({"one": again, "two": again})
    assert both.count("<figure>") == 2 * 3 + 1
    assert both.index('alt="source: a red star"') < both.index('alt="before: a red star"')


def test_a_group_is_ranked(write_run):
    page = sections.group(write_run())
    assert re.findall(r"(\d)\. <b>([\d.]+)</b>", page) == [("1", "0.75"), ("2", "0.5"), ("3", "0.25")]
    assert "The 3 candidates of one prompt in iteration 10" in page


def test_time_is_told_by_stage_with_evaluations_shared_out(write_run):
    page = sections.cost(write_run(memory__rollout_gib=12.25))
    assert [[row[0], row[1], row[3]] for row in cells(page)] == [
        ["rollout", "2.00 s", "12.2 GiB"],
        ["reward", "0.50 s", ""],
        ["update", "1.00 s", ""],
        ["evaluation", "0.60 s", ""],  # two of 3 s in ten iterations
    ]
    assert "41 s in all. An evaluation takes 3.0 s and comes every 5 iterations." in page
    assert "8.00 without gradients and 1.25 with them" in page


def test_settings_give_the_command_and_the_adapter(write_run):
    record = write_run("a run")
    page = sections.settings(record)
    assert f"ngrpo train &#x27;{record.folder / 'config.yaml'}&#x27;" in page
    assert "num_iterations: 10" in page
    assert "SHA-256" not in page
    adapter = record.folder / "adapter" / "pytorch_lora_weights.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"weights")
    assert f"{adapter}\nSHA-256 {digest(adapter)}" in sections.settings(record)


@pytest.mark.parametrize(("combine", "shown"), [("raw", True), ("standardized", False)])
def test_the_band_is_left_out_where_it_has_another_scale(write_run, make_config: MakeConfig, combine: str, shown: bool):
    record = write_run()
    config = make_config(record.folder, "rewards=[world, jpeg]", f"rewards.combine={combine}")
    page = sections.training_curve(Record(record.folder, config, record.rows, False))
    assert "Reward: world + jpeg" in page
    assert ("<polygon" in page) == shown
    assert "<polygon" in sections.training_curve(record)


@pytest.mark.parametrize(("seconds", "words"), [(40.4, "40 s"), (725, "12 min"), (11100, "3 h 05 min")])
def test_durations_in_words(seconds: float, words: str):
    assert sections.in_minutes(seconds) == words


def test_curves_and_warnings_do_not_compare_other_prompts(write_run):
    record = write_run(watched=-2.0)
    assert "other prompts" not in sections.curves(record)
    assert len(health.warnings(record)) == 1
    path = record.folder / "evaluations" / "000010.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    again = Record.read(record.folder, record.config, is_running=False)
    page = sections.curves(again)
    assert "held-out from 0.2 to 0.2; held-out, other prompts from 0.6 to 0.6" in page
    assert "strict accuracy, other prompts from 0.6 to 0.6" in page
    assert "world_manifold, other prompts from 0.6 to 0.6" in page
    assert "run, other prompts" in comparison.curves({"run": again})
    assert health.warnings(again) == []
