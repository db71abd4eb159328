"""The simulated voter: its tastes, its mistakes, and that it votes at a page as a browser does."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from vote_groups import make_group

from ngrpo_lora.guests.calls import in_thread
from ngrpo_lora.voting.simulated import Voter, is_large, is_warm, large, vote_at, warm
from ngrpo_lora.voting.voting import Voting


def drawn(*colors: str, size: int = 20) -> Image.Image:
    image = Image.new("RGB", (64, 64), (235, 230, 232))
    for place, color in enumerate(colors):
        ImageDraw.Draw(image).rectangle((30 * place, 0, 30 * place + size - 1, 19), color)
    return image


def test_tastes_know_what_they_see():
    assert [warm(drawn(color)) for color in ("red", "orange", "#fad228", "#32a046", "blue", "purple")] == [1] * 3 + [
        0
    ] * 3
    assert warm(drawn("red", "blue")) == 0.5
    assert warm(drawn()) == large(drawn()) == 0
    assert large(drawn("red")) == pytest.approx(400 / 4096)
    assert [is_warm(drawn("red")), is_warm(drawn("red", "blue")), is_large(drawn("red", size=30))] == [1, 0, 1]


def test_without_mistakes_the_best_and_the_worst_are_named():
    voter, images = Voter(warm, 0, 0), [drawn("blue", "red"), drawn("blue"), drawn("red"), drawn("red", "blue")]
    assert voter.order(images) == [[2], [0, 3], [1]]
    assert voter.order(images[1:3]) == [[1], [0]]


@pytest.mark.parametrize("wrong", [0.1, 0.3])
def test_mistakes_are_as_frequent_as_said_and_alike(wrong: float):
    voter, images = Voter(large, wrong, 1), [drawn("red", size=size) for size in (4, 8, 12, 16, 20)]
    said = np.array([voter.order(images)[0][0] for _ in range(4000)])
    assert np.mean(said != 4) == pytest.approx(wrong, abs=0.03)
    assert [np.mean(said == other) for other in range(4)] == [pytest.approx(wrong / 4, abs=0.02)] * 4


def test_it_votes_at_a_page_until_that_is_gone(tmp_path: Path):
    voting = Voting(tmp_path / "votes.jsonl", undo_s=0)
    never = threading.Event()
    counted = in_thread(partial(vote_at, voting.address, Voter(warm, 0, 0), never.is_set))
    for number in range(3):
        group = make_group(number)
        scores = voting.wait(group.prompt, group.images)
        assert np.argmax(scores) == np.argmax([warm(image) for image in group.images])  # pyright: ignore
    voting.close()
    assert counted.result(30) == 3
