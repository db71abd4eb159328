"""Votes on disk: what is said comes back, whatever befalls the file, and nothing of it is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from vote_groups import make_group

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.voting.ballots import Ballot, Group, VotesFile


def ballot(group: Group, *order: list[int]) -> Ballot:
    tiers = tuple(map(tuple, order))
    return Ballot(group=group.name, prompt=group.prompt, pictures=group.pictures, said="order", orders=(tiers,))


def cast(path: Path, *groups: Group) -> list[Ballot]:
    """Votes for the first picture of each group, in a new file."""
    file = VotesFile(path)
    for group in groups:
        file.add(ballot(group, [0], [1, 2]), group)
    return [*file.ballots.values()]


def test_votes_and_their_pictures_come_back(tmp_path: Path):
    said = cast(tmp_path / "votes.jsonl", make_group(0), make_group(1))
    file = VotesFile(tmp_path / "votes.jsonl")
    assert [*file.ballots.values()] == said
    assert file.damaged == []
    for name, image in zip(make_group(0).pictures, make_group(0).images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file.picture(name))), np.asarray(image))


def test_a_group_is_known_by_its_prompt_and_its_pixels():
    assert make_group(0).name == make_group(0).name
    names = {make_group(0).name, make_group(1).name, make_group(0, prompt="another").name, make_group(0, 3).name}
    assert len(names) == 4


def test_the_last_word_on_a_group_counts_and_may_be_taken_back(tmp_path: Path):
    path, (first, second, third) = tmp_path / "votes.jsonl", map(make_group, range(3))
    *_, kept = cast(path, first, second, third)
    file = VotesFile(path)
    file.add(changed := ballot(first, [2], [0]), first)
    file.undo(second.name)
    assert [*VotesFile(path).ballots.values()] == [*file.ballots.values()] == [kept, changed]
    assert len(path.read_bytes().splitlines()) == 5  # all that was ever said


def test_a_line_that_a_crash_cut_off_spoils_none_after_it(tmp_path: Path):
    path = tmp_path / "votes.jsonl"
    said = cast(path, make_group(0), make_group(1))
    torn = path.read_bytes()[:-20]
    path.write_bytes(torn)
    file = VotesFile(path)
    assert ([*file.ballots.values()], file.damaged) == (said[:1], [2])
    file.add(ballot(make_group(2), [1], [0]), make_group(2))
    again = VotesFile(path)
    assert ([*again.ballots], again.damaged) == ([make_group(0).name, make_group(2).name], [2])
    assert path.read_bytes().startswith(torn)


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00\xff\xfe",
        b"{}",
        b"[]",
        b'{"group": 3}',
        b"null",
        b"{" * 2000,
        b'{"undone": 1}',
        b'{"undone": "a", "b": 1}',
    ],
)
def test_damaged_lines_are_named_and_all_others_count(damage: bytes, tmp_path: Path):
    path = tmp_path / "votes.jsonl"
    said = cast(path, make_group(0), make_group(1))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + b"\n\n" + second)
    file = VotesFile(path)
    assert ([*file.ballots.values()], file.damaged) == (said, [2])


def test_what_is_no_file_of_votes_is_refused(tmp_path: Path):
    path = tmp_path / "votes.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(ConfigError, match="no line of .* is one; give another path"):
        VotesFile(path)
    assert path.read_text().count("\n") == 2
    with pytest.raises(ConfigError, match="must be a file, but"):
        VotesFile(tmp_path)


def test_a_first_vote_that_was_cut_off_is_no_reason_to_refuse_the_file(tmp_path: Path):
    path = tmp_path / "votes.jsonl"
    cast(path, make_group(0))
    path.write_bytes(path.read_bytes()[:30])
    assert VotesFile(path).damaged == [1]


def test_a_file_that_was_moved_away_is_written_again_with_all_votes(tmp_path: Path):
    path, file = tmp_path / "votes.jsonl", VotesFile(tmp_path / "votes.jsonl")
    for number in range(3):
        file.add(ballot(make_group(number), [0], [1]), make_group(number))
        path.rename(tmp_path / f"moved-{number}.jsonl")
    file.add(ballot(make_group(3), [0], [1]), make_group(3))
    assert [*VotesFile(path).ballots] == [make_group(number).name for number in range(4)]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs a folder in place of the file")
def test_a_vote_that_cannot_be_written_does_not_count(tmp_path: Path):
    path, file = tmp_path / "votes.jsonl", VotesFile(tmp_path / "votes.jsonl")
    path.mkdir()
    with pytest.raises(UserError, match="cannot be kept in .*; it does not count"):
        file.add(ballot(make_group(0), [0], [1]), make_group(0))
    assert file.ballots == {}
    path.rmdir()
    file.add(ballot(make_group(0), [0], [1]), make_group(0))
    assert [*VotesFile(path).ballots] == [make_group(0).name]


@pytest.mark.parametrize(
    ("said", "orders", "problem"),
    [
        ("order", [], "one picture is better than another"),
        ("order", [[[0, 1]]], "one picture is better than another"),
        ("order", [[[0], [4]]], "from 0 to 3"),
        ("order", [[[-1], [0]]], "from 0 to 3"),
        ("order", [[[0], [1, 0]]], "name a picture once"),
        ("none", [[[0], [1]]], "must be empty where none is said"),
        ("skip", [[[0], [1]]], "must be empty where skip is said"),
        ("better", [], "'order', 'none' or 'skip'"),
        ("order", [[["0"], [1]]], "valid integer"),
        ("order", [[[True], [0]]], "valid integer"),
    ],
)
def test_what_says_nothing_is_no_vote(said: str, orders: list[object], problem: str):
    group = make_group(0)
    line = {"group": group.name, "prompt": "", "pictures": group.pictures, "said": said, "orders": orders}
    with pytest.raises(ValidationError, match=problem):
        Ballot.model_validate_json(json.dumps(line))
