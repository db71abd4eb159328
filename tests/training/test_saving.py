"""Checkpoints are written beside the training, one at a time."""

from __future__ import annotations

import threading

import pytest

from ngrpo_lora.errors import UserError
from ngrpo_lora.training.saving import Saver


def test_writing_holds_nobody_up_and_is_told_of_once():
    saver, go_on, order = Saver(), threading.Event(), []

    def slow() -> None:
        assert go_on.wait(10)
        order.append(1)

    saver.start(1, slow)
    assert saver.finished() == []
    go_on.set()
    saver.start(2, lambda: order.append(2))  # waits for the one before
    saver.wait()
    assert order == [1, 2]
    assert saver.finished() == [1, 2]
    assert saver.finished() == []
    saver.wait()


def test_what_could_not_be_written_is_raised_where_it_is_asked_for():
    def full() -> None:
        raise UserError("no room")

    saver = Saver()
    saver.start(1, full)
    with pytest.raises(UserError, match="no room"):
        saver.wait()
    assert saver.finished() == []
    saver.start(2, full)
    with pytest.raises(UserError, match="no room"):
        saver.start(3, lambda: None)
