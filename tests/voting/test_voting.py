"""`Voting` as a program uses it: a page opens, `wait` returns what was said, and nobody waits for ever."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from vote_groups import make_group

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.guests.calls import in_thread
from ngrpo_lora.voting.voting import TOKEN_ENV, Voting, has_browser


@pytest.fixture
def voting(tmp_path: Path) -> Iterator[Voting]:
    opened = Voting(tmp_path / "votes.jsonl", port=None, undo_s=0)
    yield opened
    opened.close()


def group_at(voting: Voting) -> dict[str, object]:
    """The group that the page shows, once there is one."""
    for _ in range(600):
        if group := requests.get(f"{voting.address}state", timeout=30).json()["group"]:
            return group
        time.sleep(0.05)
    raise AssertionError("no group is shown")


def test_wait_returns_the_scores_of_what_was_said_at_the_page(voting: Voting):
    group = make_group(0)
    waiting = in_thread(lambda: voting.wait(group.prompt, group.images))
    vote = {"group": group_at(voting)["name"], "said": "order", "orders": [[[3], [1]]]}
    requests.post(f"{voting.address}ballot", json=vote, timeout=30).raise_for_status()
    scores = waiting.result(30)
    assert scores[3] > 0 > scores[1]
    assert [*np.isnan(scores)] == [True, False, True, False]
    assert voting.metrics()["votes"] == 1


def test_who_stops_waiting_withdraws_the_group(voting: Voting):
    group, stop = make_group(0), threading.Event()
    waiting = in_thread(lambda: voting.wait(group.prompt, group.images, stop.is_set))
    group_at(voting)
    stop.set()
    started = time.monotonic()
    assert waiting.result(30) is None
    assert time.monotonic() - started < 1
    assert requests.get(f"{voting.address}state", timeout=30).json()["group"] is None


def test_what_should_stop_raises_is_passed_on(voting: Voting):
    def cancelled() -> bool:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        voting.wait("", make_group(0).images, cancelled)
    assert not voting.booth.waiting


def test_closing_ends_all_waiting(voting: Voting):
    waiting = [in_thread(lambda n=n: voting.wait("", make_group(n).images)) for n in range(3)]
    group_at(voting)
    voting.close()
    assert [one.result(5) for one in waiting] == [None] * 3


def test_a_place_that_votes_cannot_be_kept_in_is_refused_before_anybody_is_asked(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="votes must be a file that can be written, but .*; choose another"):
        Voting(tmp_path / "file" / "votes.jsonl", port=None)


def test_the_token_is_new_each_time_or_the_environments(
    voting: Voting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert len(voting.token) >= 20
    monkeypatch.setenv(TOKEN_ENV, "mine")
    other = Voting(tmp_path / "other.jsonl")
    assert other.address.endswith("/mine/")
    other.close()


def test_a_run_that_nobody_votes_for_says_so_once_in_an_hour(voting: Voting, caplog: pytest.LogCaptureFixture):
    voting.booth.show(make_group(0))
    with caplog.at_level(logging.WARNING):
        for minutes in (0, 9, 11, 30, 69, 72, 100):
            voting.booth.last_event = time.monotonic() - 60 * minutes
            voting._remind()
    assert [record.args[:2] for record in caplog.records] == [(11, 1), (72, 1)]  # pyright: ignore
    assert "can be stopped and resumed" in caplog.text
    assert voting.address in caplog.text


@pytest.mark.parametrize(("display", "expected"), [("", False), (":0", True)])
def test_a_browser_is_opened_only_where_there_is_a_screen(
    display: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert has_browser() == expected
    opened, asked = threading.Event(), []
    monkeypatch.setattr("webbrowser.open", lambda address: (asked.append(address), opened.set()))
    voting = Voting(tmp_path / "votes.jsonl", open_browser=True)
    for number in range(2):
        in_thread(lambda number=number: voting.wait("", make_group(number).images))
    group_at(voting)
    opened.wait(5 if expected else 0.5)
    voting.close()
    assert asked == ([voting.address] if expected else [])
