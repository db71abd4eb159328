"""Votes of several people, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation import votes
from ngrpo_lora.evaluation.statistics import share_interval


def ballot(path: Path, choices: str, comparison_id: str = "abc") -> Path:
    names = {"w": "label", "t": "tie", "l": "reference"}
    votes = [
        {"label": "new", "reference": "base", "prompt": f"prompt {row // 2}", "seed": row, "choice": names[choice]}
        for row, choice in enumerate(choices)
    ]
    path.write_text(json.dumps({"format": "ngrpo-votes-1", "comparison": comparison_id, "votes": votes}))
    return path


def test_votes_of_several_people_are_counted_together(tmp_path: Path):
    paths = [ballot(tmp_path / "a.json", "wwtl"), ballot(tmp_path / "b.json", "wwww")]
    (found,) = votes.read_votes(paths)
    assert (found.label, found.reference, found.wins, found.ties, found.losses) == ("new", "base", 6, 1, 1)
    assert found.win_rate == share_interval([1, 1, 0.5, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1])
    assert "| new | base | 81% [" in votes.votes_table([found])


def test_other_files_and_other_comparisons_are_no_votes(tmp_path: Path):
    (tmp_path / "other.json").write_text('{"format": "something"}')
    (tmp_path / "torn.json").write_text("{")
    for path in (tmp_path / "other.json", tmp_path / "torn.json"):
        with pytest.raises(ConfigError, match=rf"--votes must be a file that blind.html saved, but '.*{path.name}'"):
            votes.read_votes([path])
    with pytest.raises(ConfigError, match="--votes must be a file, but"):
        votes.read_votes([tmp_path / "gone.json"])
    with pytest.raises(ConfigError, match="must be of one comparison"):
        votes.read_votes([ballot(tmp_path / "a.json", "w"), ballot(tmp_path / "b.json", "w", "xyz")])
