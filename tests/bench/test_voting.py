"""Runs that a simulated voter teaches: they are complete, and the voter's taste shows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from commands import refuse

from ngrpo_lora.bench import voting
from ngrpo_lora.bench.voting import Outcome, configured, taught, vote_table
from ngrpo_lora.config import RunConfig
from ngrpo_lora.errors import ConfigError, UserError

SHORT = [
    "model.dtype=float32",
    "rollout.num_steps=4",
    "rollout.group_size=4",
    "trainer.num_iterations=3",
    "evaluation.num_prompts=4",
    "evaluation.strict=null",
]


def test_a_row_says_what_votes_have_changed(tmp_path: Path):
    said: list[str] = []
    vote_table("warm", [0.1], [3], tmp_path, SHORT, said.append)
    _, _, row = said[0].splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["warm", "10%", "3", "6"]
    before, after, rise = (float(cell.strip("%")) for cell in cells[4:7])
    assert rise == pytest.approx(after - before, abs=0.11)
    assert len((tmp_path / "warm-10-3" / "votes.jsonl").read_text().splitlines()) == 6


def test_an_unknown_taste_is_refused():
    assert "--taste must be one of warm, large, got 'warn'; did you mean warm?" in refuse(
        "bench", "vote", "--taste", "warn"
    )


@pytest.mark.parametrize("setting", ["seed=4", "output_dir=x", "rewards=world", "rewards.train=world", "evaluation={}"])
def test_what_the_bench_sets_for_every_run_cannot_be_given(setting: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"{setting.split('=')[0]} must be left to `ngrpo bench vote`"):
        configured("warm", 0.1, 0, tmp_path, [setting])


def test_two_probabilities_have_two_folders(tmp_path: Path):
    folders = {configured("warm", wrong, 0, tmp_path).output_dir for wrong in (0.1, 0.101, 0.1000001)}
    assert len(folders) == 3
    assert str(tmp_path / "warm-10-0") in folders


def test_rows_that_are_complete_are_told_where_a_later_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fake(config: RunConfig, taste: str, wrong: float) -> Outcome:
        if config.seed == 1:
            raise UserError("no")
        return Outcome(taste, wrong, config.seed, 2, 0.5, 0.75, 0.6, 0.6, math.nan)

    monkeypatch.setattr(voting, "taught", fake)
    said: list[str] = []
    with pytest.raises(UserError, match="no"):
        vote_table("warm", [0.1], [0, 1], tmp_path, SHORT, said.append)
    assert said[0].splitlines()[2:] == ["| warm | 10% | 0 | 2 | 50.0% | 75.0% | +25.0 |  | 0.600 → 0.600 |"]


def test_what_cannot_run_is_told_before_the_first_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(voting, "taught", lambda *_: pytest.fail("begun"))
    later = tmp_path / "warm-10-1"
    later.mkdir()
    (later / "config.yaml").write_text("lora: {rank: 3}")
    with pytest.raises(ConfigError, match="output_dir must not hold another run"):
        vote_table("warm", [0.1], [0, 1], tmp_path, SHORT, print)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0.1, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_within_150_votes_a_taste_is_taught_in_spite_of_mistakes(wrong: float, seed: int, tmp_path: Path):
    found = taught(configured("warm", wrong, seed, tmp_path), "warm", wrong)
    assert found.votes == 150
    assert found.after - found.before >= 0.2
    assert found.world_after > found.world_before - 0.05  # captions are kept as well as before
