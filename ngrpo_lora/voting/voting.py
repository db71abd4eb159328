"""Ask a person: the page, the votes so far, and scores of groups of pictures as they are voted on."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ngrpo_lora.console import console
from ngrpo_lora.types import Metrics
from ngrpo_lora.voting.ballots import Group, VotesFile
from ngrpo_lora.voting.booth import Booth
from ngrpo_lora.voting.head import Features, Head, pixel_features
from ngrpo_lora.voting.server import PageServer

__all__ = ["TOKEN_ENV", "Voting"]

log = logging.getLogger(__name__)

TOKEN_ENV = "NGRPO_VOTE_TOKEN"
POLL_S = 0.1
REMINDERS_S = (600.0, 3600.0)
"""After how long without a vote the screen says so: first, and then again and again."""


class Voting:
    """A voting page that is open, from when this is made until `close`.

    voting = Voting(Path("votes.jsonl"))
    voting.address                          # to open in a browser
    voting.wait("a red heart", images)      # G scores, NaN where nothing was said
    voting.close()
    """

    def __init__(
        self,
        votes: Path,
        host: str = "127.0.0.1",
        port: int | None = None,
        features: Features = pixel_features,
        head_votes: bool = False,
        undo_s: float = 2.0,
        open_browser: bool = False,
    ):
        """Read the votes so far, open the page and print its address.

        Args:
            votes: the file that votes are kept in; it need not exist.
            port: None for any free one.
            features: what the head reads.
            head_votes: whether the head votes along once it predicts votes that it did not know.
            undo_s: how long the last vote can be taken back.
            open_browser: whether the first group opens this machine's browser, where there is one.
        Raises:
            UserError: the file is none of votes or cannot be written, or the address cannot be had.
        """
        file = VotesFile(votes)
        file.check_writable()
        self.booth = Booth(file, Head(features), head_votes, undo_s)
        self.token = os.environ.get(TOKEN_ENV) or secrets.token_urlsafe(16)
        self.server = PageServer(self.booth, host, port, self.token)
        self.open_browser, self.reminder = open_browser, threading.Lock()
        self.reminded_at = 0.0
        for address in self.server.addresses:
            console.print(f"vote at {address}")
        for note in self.booth.notes:
            log.warning("%s", note)

    @property
    def address(self) -> str:
        """Where this machine reaches the page, with the token."""
        return self.server.addresses[0]

    @property
    def idle_s(self) -> float:
        """For how long groups have waited without a word; seconds since the last vote where none waits."""
        return time.monotonic() - self.booth.last_event

    def wait(
        self, prompt: str, images: Sequence[Image.Image], should_stop: Callable[[], bool] = lambda: False
    ) -> np.ndarray | None:
        """Ask about a group of pictures, and wait for the answer; several threads may wait at once.

        Args:
            should_stop: asked several times a second whether to wait no longer; what it raises is passed on.
        Returns:
            (G,) float64, NaN where nothing was said; None where it was stopped or the page closed.
        """
        group = Group(prompt, images)
        self.booth.show(group)
        self._open_once()
        try:
            while (scores := self.booth.scores(group.name)) is None:
                if self.booth.is_closed or should_stop():
                    return None
                self._remind()
                time.sleep(POLL_S)
            return scores
        finally:
            self.booth.withdraw(group.name)

    def metrics(self) -> Metrics:
        """What `Booth.metrics` says."""
        return self.booth.metrics()

    def close(self) -> None:
        """End all waiting, and close the page; what was said is on the disk."""
        self.booth.is_closed = True
        self.server.close()

    def _open_once(self) -> None:
        with self.reminder:
            wanted, self.open_browser = self.open_browser, False
        if wanted and has_browser():
            threading.Thread(target=webbrowser.open, args=(self.address,), daemon=True).start()

    def _remind(self) -> None:
        """Say on the screen that nobody has voted for long."""
        with self.reminder:
            idle = self.idle_s
            if idle < REMINDERS_S[0]:
                self.reminded_at = 0.0
                return
            if self.reminded_at and idle - self.reminded_at < REMINDERS_S[1]:
                return
            self.reminded_at = idle
        log.warning(
            "no vote for %d min: %d groups wait at %s; the run can be stopped and resumed, and no vote is lost",
            idle // 60,
            len(self.booth.waiting),
            self.address,
        )


def has_browser() -> bool:
    """Whether this machine has a screen that a browser can open on; one in a terminal would take the run's place."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
