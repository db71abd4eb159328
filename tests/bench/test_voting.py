"""Runs that a simulated voter teaches: they are complete, and the voter's taste shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import refuse

from ngrpo_lora.bench.voting import configured, taught, vote_table

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


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0.1, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_within_150_votes_a_taste_is_taught_in_spite_of_mistakes(wrong: float, seed: int, tmp_path: Path):
    found = taught(configured("warm", wrong, seed, tmp_path), "warm", wrong)
    assert found.votes == 150
    assert found.after - found.before >= 0.2
    assert found.world_after > found.world_before - 0.05  # captions are kept as well as before
