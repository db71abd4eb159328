"""Votes as pairs of pictures: what was said, once, and nothing that contradicts itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from commands import refuse, run
from PIL import Image
from vote_groups import make_group

from ngrpo_lora.voting.ballots import VotesFile
from ngrpo_lora.voting.booth import Booth
from ngrpo_lora.voting.head import Head, pixel_features


def voted(path: Path) -> None:
    booth = Booth(VotesFile(path), Head(pixel_features))
    for number, (said, orders) in enumerate(
        [
            ("order", [[[2], [0, 1], [3]]]),
            ("order", [[[0], [1]], [[1], [2]], [[2], [0]], [[0], [1]], [[1], [0]], [[3], [0]]]),
            ("none", []),
            ("skip", []),
        ]
    ):
        group = make_group(number)
        booth.show(group)
        booth.cast(group.name, said, orders)
        booth.scores(group.name)


def test_pairs_are_written_with_their_pictures(tmp_path: Path):
    voted(tmp_path / "run" / "votes.jsonl")
    output = tmp_path / "out" / "pairs.jsonl"
    said = run("votes", tmp_path / "run", "--pairs", output)
    assert said[0].endswith("4: 2 that prefer pictures, 1 none of them, 1 skipped")
    assert said[-1] == f"written    8 pairs to {output}"
    rows = [json.loads(line) for line in output.read_text().splitlines()]

    def number(group: int, path: str) -> int:
        pixels = np.asarray(Image.open(output.parent / path))
        return next(n for n, image in enumerate(make_group(group).images) if (np.asarray(image) == pixels).all())

    first = [(number(0, row["chosen"]), number(0, row["rejected"])) for row in rows[:5]]
    assert first == [(2, 0), (2, 1), (2, 3), (0, 3), (1, 3)]
    second = [(number(1, row["chosen"]), number(1, row["rejected"])) for row in rows[5:]]
    assert second == [(1, 2), (2, 0), (3, 0)]  # 0 and 1 were preferred to each other
    assert {row["prompt"] for row in rows} == {"a plain picture"}


def test_where_there_are_no_votes_it_says_so(tmp_path: Path):
    for source in (tmp_path, tmp_path / "none.jsonl"):
        assert "must be a file of votes or the folder of a run that has votes.jsonl" in refuse("votes", source)
    voted(tmp_path / "votes.jsonl")
    assert "--pairs must be a file to write" in refuse("votes", tmp_path / "votes.jsonl", "--pairs", tmp_path)
