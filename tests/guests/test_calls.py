"""Calls in threads, and one line for whatever they return or raise."""

from __future__ import annotations

import pytest
import torch

from ngrpo_lora.guests.calls import described, in_thread, shown


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


def test_a_thread_has_no_gradient_and_hands_on_whatever_is_raised():
    assert in_thread(torch.is_grad_enabled).result() is False
    with pytest.raises(SystemExit):
        in_thread(exit).result()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 1), "tensor([[0.], [0.]])"),
        ("x" * 300, "'" + "x" * 199),
        (10**5000, "a value of type int that cannot be shown"),
        (Mute(), "a value of type Mute that cannot be shown"),
    ],
    ids=["tensor", "long", "large", "mute"],
)
def test_any_value_is_shown_on_one_line(value: object, text: str):
    assert shown(value) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError("no\n disk"), "OSError: no disk"),
        (Mute(), "Mute: its text cannot be shown"),
        (SystemExit(3), "SystemExit: it called exit(3), and must return scores or raise an error instead"),
    ],
)
def test_any_error_is_described_on_one_line(error: BaseException, text: str):
    assert described(error) == text
