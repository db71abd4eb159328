"""The booth: groups wait in turn, a vote counts at once, scores follow when it can no longer be taken back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from vote_groups import make_group

from ngrpo_lora.voting.ballots import Group, VotesFile
from ngrpo_lora.voting.booth import Booth, Gone
from ngrpo_lora.voting.head import Head, pixel_features
from ngrpo_lora.voting.preferences import group_scores


def opened(folder: Path, head_votes: bool = False, undo_s: float = 0.0) -> Booth:
    return Booth(VotesFile(folder / "votes.jsonl"), Head(pixel_features), head_votes, undo_s)


def by_red(group: Group) -> list[list[list[int]]]:
    return [[[int(number)] for number in np.argsort([-int(np.asarray(image)[0, 0, 0]) for image in group.images])]]


def shown(booth: Booth) -> str | None:
    return booth.state()["group"] and booth.state()["group"]["name"]


def test_groups_wait_in_turn_and_scores_follow_when_none_waits(tmp_path: Path):
    booth, (first, second) = opened(tmp_path), (make_group(0), make_group(1))
    booth.show(first)
    booth.show(second)
    assert (shown(booth), booth.state()["waiting"], booth.state()["next"]) == (first.name, 2, second.pictures)
    booth.cast(first.name, "order", [[[2], [0, 1]]])
    assert shown(booth) == second.name
    assert booth.scores(first.name) is None  # can still be taken back
    booth.cast(second.name, "skip")
    np.testing.assert_array_equal(booth.scores(first.name), group_scores([[[2], [0, 1]]], 4))  # pyright: ignore
    assert np.isnan(booth.scores(second.name)).all()  # pyright: ignore
    assert shown(booth) is None


def test_none_of_them_says_that_none_is_better(tmp_path: Path):
    booth, group = opened(tmp_path), make_group(0)
    booth.show(group)
    booth.cast(group.name, "none")
    np.testing.assert_array_equal(booth.scores(group.name), np.zeros(4))  # pyright: ignore


def test_the_last_vote_can_be_taken_back_until_scores_follow(tmp_path: Path):
    booth, (first, second) = opened(tmp_path, undo_s=3600), (make_group(0), make_group(1))
    booth.show(first)
    booth.show(second)
    for group in (first, second):
        booth.cast(group.name, "order", [[[0], [1]]])
    assert booth.scores(first.name) is None
    assert booth.state()["undo"] == [first.name, second.name]
    booth.undo(second.name)
    assert (shown(booth), booth.state()["votes"]) == (second.name, 1)
    booth.undo(first.name)
    assert (shown(booth), booth.state()["votes"], booth.state()["undo"]) == (first.name, 0, [])
    with pytest.raises(Gone, match="no vote to take back"):
        booth.undo(first.name)
    assert VotesFile(tmp_path / "votes.jsonl").ballots == {}
    booth.cast(first.name, "order", [[[3], [1]]])
    booth.cast(second.name, "skip")
    booth.undo_s = 0
    assert booth.scores(first.name)[3] > 0  # pyright: ignore
    for name in (first.name, "never"):
        with pytest.raises(Gone, match="learned from this vote already"):
            booth.undo(name)


def test_of_two_who_vote_each_takes_back_a_vote_of_their_own(tmp_path: Path):
    booth, (first, second) = opened(tmp_path, undo_s=3600), (make_group(0), make_group(1))
    for group in (first, second):
        booth.show(group)
        booth.cast(group.name, "order", [[[0], [1]]])
    booth.undo(first.name)
    assert booth.state()["names"] == [first.name]
    assert [*VotesFile(tmp_path / "votes.jsonl").ballots] == [second.name]


def test_a_vote_for_a_group_that_is_gone_or_taken_does_not_count(tmp_path: Path):
    booth, (first, second) = opened(tmp_path, undo_s=3600), (make_group(0), make_group(1))
    booth.show(first)
    booth.cast(first.name, "order", [[[0], [1]]])
    with pytest.raises(Gone, match="another window"):
        booth.cast(first.name, "order", [[[1], [0]]])
    booth.show(second)
    booth.withdraw(second.name)
    for name in (second.name, "never", ""):
        with pytest.raises(Gone, match="gone on without"):
            booth.cast(name, "skip")
    assert [ballot.orders for ballot in VotesFile(tmp_path / "votes.jsonl").ballots.values()] == [(((0,), (1,)),)]


def test_a_resumed_run_is_not_asked_again(tmp_path: Path):
    booth, groups = opened(tmp_path), [make_group(0), make_group(1)]
    for group in groups:
        booth.show(group)
    booth.cast(groups[0].name, "order", [[[2], [0]]])  # then it is killed
    again = opened(tmp_path)
    for group in groups:
        again.show(group)
    assert shown(again) == groups[1].name
    np.testing.assert_array_equal(again.scores(groups[0].name), group_scores([[[2], [0]]], 4))  # pyright: ignore


def test_what_cannot_be_read_is_said_where_the_person_looks(tmp_path: Path):
    booth, groups = opened(tmp_path), [make_group(0), make_group(1), make_group(2)]
    for group in groups:
        booth.show(group)
        booth.cast(group.name, "order", [[[0], [1]]])
    path = tmp_path / "votes.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:40] + b"\n" + third)
    booth.votes.picture(groups[0].pictures[1]).write_bytes(b"no picture")
    damaged, lost = opened(tmp_path).state()["notes"]
    assert "line 2 cannot be read and stay as they are; the 2 other votes count" in damaged
    assert "Pictures of 1 of 2 votes are not in" in lost


def test_the_head_votes_along_only_when_it_may_and_foresees_votes(tmp_path: Path):
    scores = {}
    for allowed in (False, True):
        booth = opened(tmp_path / str(allowed), head_votes=allowed)
        for number in range(40):
            group = make_group(number)
            booth.show(group)
            if number == 5:
                assert not booth.head_is_trusted
            booth.cast(group.name, "order", by_red(group))
            booth.scores(group.name)
        last = make_group(99)
        booth.show(last)
        booth.cast(last.name, "order", [[[0], [1]]])
        assert (booth.metrics()["head_votes_along"], booth.metrics()["votes"]) == (float(allowed), 41)
        assert booth.metrics()["head_accuracy"] > 0.7
        scores[allowed] = booth.scores(last.name)
    assert [*np.isnan(scores[False])] == [False, False, True, True]
    assert np.isfinite(scores[True]).all()


def test_a_vote_is_predicted_before_it_is_learned(tmp_path: Path):
    booth = opened(tmp_path)
    for number, order in enumerate(([[0], [1]], [[1], [0]])):  # of the same pictures the other way round
        group = make_group(0, prompt=str(number))
        booth.show(group)
        booth.cast(group.name, "order", [order])
        booth.scores(group.name)
    assert [ballot.predicted for ballot in booth.votes.ballots.values()] == [None, 0.0]
