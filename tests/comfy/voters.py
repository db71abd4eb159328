"""A voter at the pages of a ComfyUI server, who finds them as the browser does: by the server's events."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import requests
from comfy_client import Comfy
from PIL import Image

from ngrpo_lora.guests.calls import in_thread
from ngrpo_lora.voting.simulated import Voter, vote_at

PATIENCE_S = 300


def brightness(image: Image.Image) -> float:
    """A taste to which no two pictures are alike."""
    return float(np.asarray(image, dtype=float).mean())


class Events:
    """What a server has told all browsers of its voting pages, in order: events of `ngrpo.vote`."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    @property
    def path(self) -> str | None:
        """Where the page is that is open now."""
        return self.all[-1]["path"] if self.all else None


@contextmanager
def hearing(comfy: Comfy) -> Iterator[Events]:
    """Meanwhile, listen to a server's events."""
    events = Events()
    with comfy.listening() as (_, messages):

        def listen() -> None:
            while True:
                try:
                    message = messages.recv()
                except Exception:  # it was closed
                    return
                if not isinstance(message, str) or not message:  # binary, or the last one
                    continue
                if (content := json.loads(message))["type"] == "ngrpo.vote":
                    events.all.append(content["data"])

        threading.Thread(target=listen, daemon=True).start()
        yield events


class VotingPage:
    """A page as a program asks it, at ComfyUI's address."""

    def __init__(self, comfy: Comfy, events: Events):
        until(lambda: events.path is not None, "no page is shown")
        self.address = f"{comfy.url}{events.path}"

    def state(self) -> dict[str, Any]:
        """What it shows."""
        return requests.get(f"{self.address}state", timeout=60).json()

    def groups(self, count: int) -> dict[str, Any]:
        """What it shows once so many groups wait."""
        until(lambda: self.state()["waiting"] == count, f"{count} groups do not wait")
        return self.state()

    def vote(self, group: str, orders: Any = (((0,), (1,)),), said: str = "order") -> requests.Response:
        """Cast a vote."""
        ballot = {"group": group, "said": said, "orders": orders}
        return requests.post(f"{self.address}ballot", json=ballot, timeout=60)

    def take_back(self, group: str) -> requests.Response:
        """Take a vote back."""
        return requests.post(f"{self.address}undo", json={"group": group}, timeout=60)


@contextmanager
def attended(comfy: Comfy) -> Iterator[Events]:
    """Meanwhile, somebody votes at every page that a server opens."""
    left = threading.Event()
    with hearing(comfy) as events:

        def is_gone() -> bool:
            return left.is_set() or events.path is None

        def vote() -> None:
            while not left.wait(0.1):
                if not is_gone():
                    vote_at(f"{comfy.url}{events.path}", Voter(brightness, 0, 0), is_gone)

        done = in_thread(vote)
        try:
            yield events
        finally:
            left.set()
            done.result(60)


def until(found: Any, lack: str) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: it is not within PATIENCE_S.
    """
    end = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < end, lack
        time.sleep(0.05)
