"""Where votes are cast: which groups wait for one, what was said of them so far, and the scores that follow.

Threads of the run show groups and ask for scores, threads of the page's server cast votes; a lock keeps them apart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from PIL import Image

from ngrpo_lora.errors import UserError
from ngrpo_lora.types import Metrics
from ngrpo_lora.voting.ballots import Ballot, Group, VotesFile
from ngrpo_lora.voting.head import Head, accuracy
from ngrpo_lora.voting.preferences import Order, group_scores

__all__ = ["Booth", "Gone", "recall"]

Said = Literal["order", "none", "skip"]


class Gone(UserError):
    """A vote comes too late, or somebody else was faster; the message says which."""


def recall(votes: VotesFile, head: Head) -> list[str]:
    """Let a head learn from the votes of a file; what of it cannot be read, in words."""
    notes, lost, count = [], 0, len(votes.ballots)
    for ballot in votes.ballots.values():
        try:
            images = [Image.open(votes.picture(name)).convert("RGB") for name in ballot.pictures]
        except (OSError, ValueError):  # also what is no picture
            lost += 1
        else:
            head.look(ballot.pictures, images)
    head.learn(votes.ballots.values())
    if votes.damaged:
        many, shown = len(votes.damaged), ", ".join(map(str, votes.damaged[:5]))
        lines = f"line {shown}" if many == 1 else f"lines {shown}{f' and {many - 5} more' if many > 5 else ''}"
        notes.append(f"{votes.path.name}: {lines} cannot be read and stay as they are; the {count} other votes count.")
    if lost:
        notes.append(
            f"Pictures of {lost} of {count} votes are not in {str(votes.pictures)!r}; the head learns without them."
        )
    return notes


class Booth:
    """The groups that wait for a vote, in the order in which they came.

    A vote counts as soon as it is on the disk. Scores follow once no group waits any more and the last vote is
    `undo_s` old: until then it can be taken back.
    """

    def __init__(self, votes: VotesFile, head: Head, head_votes: bool = False, undo_s: float = 0.0):
        """`head_votes`: whether the head votes along once it is better than chance on votes that it did not know."""
        self.votes, self.head, self.head_votes, self.undo_s = votes, head, head_votes, undo_s
        self.lock = threading.RLock()
        self.waiting: dict[str, Group] = {}  # without a vote
        self.said: dict[str, Group] = {}  # with one that can be taken back
        self.scored: dict[str, np.ndarray] = {}
        self.last_event = time.monotonic()
        self.is_closed = False
        self.notes = recall(votes, head)

    def show(self, group: Group) -> None:
        """Let a group wait for a vote; one that the file has a vote for, as after a resumed run, has its scores now."""
        self.head.look(group.pictures, group.images)
        assert group.files  # encoded before anybody waits for them
        with self.lock:
            if not self.waiting:
                self.last_event = time.monotonic()
            if group.name in self.votes.ballots:
                self.scored[group.name] = self._scores(group)
            else:
                self.waiting[group.name] = group

    def withdraw(self, name: str) -> None:
        """Ask nobody any more about a group."""
        with self.lock:
            for groups in (self.waiting, self.said, self.scored):
                groups.pop(name, None)

    def cast(self, name: str, said: Said, orders: Sequence[Order] = ()) -> None:
        """Take a vote on a group, and keep it on the disk.

        Raises:
            Gone: the group does not wait for a vote.
            pydantic.ValidationError: the orders are none of its pictures.
            UserError: the vote cannot be written, and does not count.
        """
        with self.lock:
            group = self.waiting.get(name)
            if group is None:
                raise Gone(
                    "This group has a vote already, from another window; yours does not count."
                    if name in self.votes.ballots
                    else "The run has gone on without this group; your vote does not count."
                )
            ballot = Ballot(
                group=name,
                prompt=group.prompt,
                pictures=group.pictures,
                said=said,
                orders=tuple(tuple(tuple(tier) for tier in order) for order in orders),
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            self.votes.add(ballot.model_copy(update={"predicted": self.head.predicted(ballot)}), group)
            self.said[name] = self.waiting.pop(name)
            self.last_event = time.monotonic()

    def undo(self, name: str) -> None:
        """Take back the vote on a group, which waits for one again, before all others; Gone where it is too late."""
        with self.lock:
            if name in self.waiting:
                raise Gone("There is no vote to take back: these pictures wait for one.")
            if name not in self.said:
                raise Gone("The run has learned from this vote already; it cannot be taken back any more.")
            self.votes.undo(name)
            self.waiting = {name: self.said.pop(name)} | self.waiting
            self.last_event = time.monotonic()

    def scores(self, name: str) -> np.ndarray | None:
        """The scores of a group's pictures, NaN where nothing was said; None as long as they can still change."""
        with self.lock:
            if self.said and not self.waiting and time.monotonic() - self.last_event >= self.undo_s:
                self.scored |= {each: self._scores(group) for each, group in self.said.items()}
                self.said.clear()
                self.head.learn(self.votes.ballots.values())
            return self.scored.pop(name, None)

    def _scores(self, group: Group) -> np.ndarray:
        """What was said of a group, as scores; where the head votes along, it is what is expected beforehand."""
        ballot, count = self.votes.ballots[group.name], len(group.pictures)
        if ballot.said == "none":  # none is better than another
            return np.zeros(count)
        return group_scores(ballot.orders, count, self.head.worths(group.pictures) if self.head_is_trusted else None)

    @property
    def head_is_trusted(self) -> bool:
        """Whether the head votes along."""
        return self.head_votes and accuracy(self.votes.ballots.values()).is_better_than_chance

    def metrics(self) -> Metrics:
        """How many votes there are, and the share of the last ones' pairs that the head had foreseen."""
        with self.lock:
            return {
                "votes": float(len(self.votes.ballots)),
                "head_accuracy": accuracy(self.votes.ballots.values()).share,
                "head_votes_along": float(self.head_is_trusted),
            }

    def picture(self, name: str) -> bytes | None:
        """A picture of a group that is shown or was just voted on, as PNG; None where there is none of this name."""
        with self.lock:
            for group in (*self.waiting.values(), *self.said.values()):
                if name in group.pictures:
                    return group.files[group.pictures.index(name)]
        return None

    def state(self) -> dict[str, Any]:
        """All that the page shows, as JSON."""
        with self.lock:
            groups = [
                {"name": group.name, "prompt": group.prompt, "pictures": group.pictures}
                for group in [*self.waiting.values()][:2]
            ]
            found = accuracy(self.votes.ballots.values())
            return {
                "group": groups[0] if groups else None,
                "next": groups[1]["pictures"] if len(groups) > 1 else [],
                "waiting": len(self.waiting),
                "names": [*self.waiting],
                "votes": len(self.votes.ballots),
                "undo": [*self.said],
                "head": {
                    "predicted": found.count,
                    "accuracy": found.share if found.count else None,
                    "votes_along": self.head_is_trusted,
                },
                "idle_s": round(time.monotonic() - self.last_event),
                "file": str(self.votes.path),
                "notes": self.notes,
                "ended": self.is_closed,
            }
