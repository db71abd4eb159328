"""The head: it finds a taste that is known, judges itself on votes it had not seen, and forgets what is taken back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from vote_groups import make_group

from ngrpo_lora.voting.ballots import Ballot, Group
from ngrpo_lora.voting.head import FEWEST, Head, accuracy, pixel_features


def redness(group: Group) -> list[int]:
    return [int(np.asarray(image)[0, 0, 0]) - int(np.asarray(image)[0, 0, 2]) for image in group.images]


def vote(group: Group, predicted: float | None = None) -> Ballot:
    """The whole ranking of a group by redness."""
    order = tuple((int(number),) for number in np.argsort([-worth for worth in redness(group)]))
    return Ballot(
        group=group.name, prompt="", pictures=group.pictures, said="order", orders=(order,), predicted=predicted
    )


def looked(head: Head, groups: list[Group]) -> list[Ballot]:
    for group in groups:
        head.look(group.pictures, group.images)
    return [vote(group) for group in groups]


def test_a_known_taste_is_learned_from_a_few_votes_and_carries_over_to_other_pictures():
    head = Head(pixel_features)
    head.learn(looked(head, [make_group(number) for number in range(30)]))
    unseen = looked(head, [make_group(number) for number in range(100, 140)])
    assert np.mean([head.predicted(ballot) for ballot in unseen]) > 0.85


def test_without_a_vote_nothing_is_predicted():
    head = Head(pixel_features)
    (ballot,) = looked(head, [make_group(0)])
    assert head.predicted(ballot) is None
    head.learn([ballot])
    assert head.predicted(ballot) == 1
    head.learn([])
    assert head.predicted(ballot) is None


def test_the_weights_depend_on_the_votes_alone_and_not_on_their_order():
    head, groups = Head(pixel_features), [make_group(number) for number in range(6)]
    ballots = looked(head, groups)
    head.learn(ballots)
    first = head.worths(groups[0].pictures)
    head.learn(ballots[:3])
    head.learn(ballots[::-1])
    np.testing.assert_allclose(head.worths(groups[0].pictures), first, atol=1e-3)  # pyright: ignore


def test_features_of_any_size_give_the_same_worths():
    group, found = make_group(0), []
    for factor in (1e-3, 1.0, 1e3):
        head = Head(lambda images, factor=factor: factor * pixel_features(images))
        head.learn(looked(head, [group]))
        found.append(head.worths(group.pictures))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
    np.testing.assert_allclose(found[2], found[1], rtol=1e-3)


def test_pictures_that_are_all_alike_teach_nothing():
    group = make_group(0)
    same = Group("", [group.images[0]] * 3)
    head = Head(pixel_features)
    head.learn(looked(head, [same]))
    np.testing.assert_array_equal(head.worths(same.pictures), 0)  # pyright: ignore


@pytest.mark.parametrize(
    ("predicted", "is_better"),
    [
        ([], False),
        ([1.0] * (FEWEST - 1), False),
        ([1.0] * FEWEST, True),
        ([0.5] * 50, False),
        ([0.0, 1.0] * 25, False),
        ([0.0, 1.0] * 23 + [1.0] * 4, False),  # 54%, as may be by chance
        ([0.2, 1.0, 1.0] * 15, True),
        ([1.0] * 50 + [0.4] * 50, False),  # what it knew once
    ],
)
def test_the_head_is_judged_by_the_last_votes_it_did_not_know(predicted: list[float], is_better: bool):
    found = accuracy(vote(make_group(number), share) for number, share in enumerate(predicted))
    assert found.is_better_than_chance == is_better
    assert found.count == min(50, len(predicted))
    assert found.share == pytest.approx(np.mean(predicted[-50:])) if predicted else math.isnan(found.share)
