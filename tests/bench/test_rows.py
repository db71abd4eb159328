"""A bench's file: whole after every row, gone on with by the same bench, and refused to any other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ngrpo_lora.bench import rows
from ngrpo_lora.bench.rows import Countdown, Rows
from ngrpo_lora.bench.varying import all_settings
from ngrpo_lora.errors import ConfigError

SETTINGS = all_settings("demo", [], ["rollout.num_steps=4,8"])


def test_rows_are_there_for_the_next_call(tmp_path: Path):
    path = tmp_path / "new" / "rows.json"
    first = Rows(path, "gradient", {"gradients": 3}, SETTINGS)
    first.add(SETTINGS[0], {"value": 0.5, "low": math.nan})
    (kept,) = json.loads(path.read_text())["rows"]
    assert (kept["label"], kept["value"], kept["low"]) == ("rollout.num_steps=4", 0.5, None)
    assert kept["config"]["rollout"]["num_steps"] == 4
    second = Rows(path, "gradient", {"gradients": 3}, SETTINGS)
    assert second.rows == first.rows
    second.add(SETTINGS[1], {"value": 0.7})
    assert [row["value"] for row in json.loads(path.read_text())["rows"]] == [0.5, 0.7]
    assert Rows(path, "gradient", {"gradients": 3}, SETTINGS).rows == second.rows


def test_other_values_of_what_is_varied_go_on_in_the_same_file(tmp_path: Path):
    path = tmp_path / "rows.json"
    Rows(path, "gradient", {}, SETTINGS).add(SETTINGS[0], {"value": 0.5})
    others = all_settings("demo", ["output_dir=elsewhere"], ["rollout.num_steps=16", "algorithm=flow_grpo"])
    assert [*Rows(path, "gradient", {}, others).rows] == ["rollout.num_steps=4"]


def test_rows_of_anything_else_are_refused_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.json"
    Rows(path, "gradient", {"gradients": 3}, SETTINGS).add(SETTINGS[0], {"value": 0.5})
    before = path.read_text()

    def refusal(bench: str = "gradient", gradients: int = 3, *overrides: str) -> str:
        settings = all_settings("demo", overrides, ["rollout.num_steps=4"])
        with pytest.raises(ConfigError) as error:
            Rows(path, bench, {"gradients": gradients}, settings)
        assert path.read_text() == before
        return str(error.value)

    assert "measured otherwise (gradients: 3 -> 4)" in refusal("gradient", 4)
    assert "measured otherwise (bench: gradient -> other)" in refusal("other")
    assert "measured otherwise (seed: 0 -> 1)" in refusal("gradient", 3, "seed=1")
    others = all_settings("demo", ["seed=1"], ["rollout.num_steps=16"])
    with pytest.raises(ConfigError, match=r"\(seed: 0 -> 1\)"):
        Rows(path, "gradient", {"gradients": 3}, others)
    monkeypatch.setattr(rows, "code_version", lambda: "9.0")
    assert "-> 9.0)" in refusal()


@pytest.mark.parametrize("lost", ["label", "config", "setting", "config.seed"])
def test_a_row_that_has_lost_something_is_refused(lost: str, tmp_path: Path):
    """The last is of a configuration that there is no longer."""
    path = tmp_path / "rows.json"
    Rows(path, "gradient", {}, SETTINGS).add(SETTINGS[0], {"value": 0.5})
    found = json.loads(path.read_text())
    row = found["rows"][0]
    if lost == "config.seed":
        row["config"]["sede"] = row["config"].pop("seed")
    else:
        del row[lost]
    path.write_text(json.dumps(found))
    others = all_settings("demo", [], ["rollout.num_steps=16"])
    with pytest.raises(ConfigError, match="must be a new file or one of `ngrpo bench gradient`"):
        Rows(path, "gradient", {}, others)


@pytest.mark.parametrize("text", ["not json", "[]", '{"bench": "gradient"}', '{"rows": 3}'])
def test_a_file_of_another_kind_is_refused_and_stays(text: str, tmp_path: Path):
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="must be a new file or one of `ngrpo bench gradient`"):
        Rows(path, "gradient", {}, SETTINGS)
    assert path.read_text() == text


def test_a_file_that_cannot_be_written_is_known_before_the_first_row(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output must be a writable file"):
        Rows(tmp_path / "file" / "rows.json", "gradient", {}, SETTINGS)


def test_a_countdown_speaks_seldom_and_by_what_is_done(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(rows.time, "monotonic", lambda: now[0])
    told: list[str] = []
    countdown = Countdown(40, told.append, every_s=10)
    for seconds, work in ((4, 4), (8, 6), (1, 2), (200, 8), (5, 20)):
        now[0] += seconds
        countdown.done(work, "row")
    assert told == [
        "row: 25% of all, about 36 s left",  # 12 s for 10 of 40
        "row: 50% of all, about 4 min left",  # 213 s for 20 of 40
        "row: 100% of all, about 0 s left",
    ]
