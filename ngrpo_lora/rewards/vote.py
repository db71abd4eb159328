"""What a person prefers: a page in the browser shows the pictures of each prompt, and waits for a vote.

    u, the most likely worths under Plackett and Luce's model of what was said, with a prior of mean 0 and deviation 1

NaN where nothing was said. Every vote is in `votes.jsonl` of the run's folder at once, its pictures beside it: a run
that is resumed asks for none of them again. `ngrpo_lora/voting/README.md` says how to vote, from a phone too.

    ngrpo train demo-vote
    rewards: {name: vote, path: openai/clip-vit-large-patch14, head_votes: true}     # a head on CLIP, that votes along
    rewards: {name: vote, ask: false, votes: runs/mine/votes.jsonl}                  # the head alone, on earlier votes

The head is linear, on colours or on the CLIP of `path`, and learns from all votes so far. Its accuracy, on votes that
it had not seen, is on the page and in `rollout/vote/head_accuracy`. No network, no download without `path`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from ngrpo_lora.config.paths import PathText
from ngrpo_lora.config.plugins import ClipConfig
from ngrpo_lora.errors import UserError
from ngrpo_lora.guests.calls import in_thread
from ngrpo_lora.types import Metrics
from ngrpo_lora.voting.ballots import FILE_NAME, VotesFile
from ngrpo_lora.voting.booth import recall
from ngrpo_lora.voting.head import Features, Head, pixel_features


class Config(ClipConfig, frozen=True):
    """Settings of voting: the page, the file of votes, and the head that learns from them."""

    may_change: ClassVar = (*ClipConfig.may_change, "host", "port", "open_browser", "undo_s")

    votes: PathText | None = Field(
        default=None, min_length=1, pattern=r"\.jsonl$", description="File of the votes; null: votes.jsonl of the run."
    )
    ask: bool = Field(default=True, description="Ask a person; false: the head alone judges, as earlier votes have it.")
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address of the page: this machine's alone, or 0.0.0.0 for a phone in the same network.",
    )
    port: int | None = Field(
        default=None, ge=1, le=65535, description="Port of the page; null: 8770, or a free one where that is taken."
    )
    open_browser: bool = Field(default=True, description="Open the page in this machine's browser, if it has one.")
    undo_s: float = Field(default=2.0, ge=0, description="How long a vote can be taken back once no group waits.")
    head_votes: bool = Field(
        default=False,
        description="The head votes along, on what was not said too, once it predicts votes that it did not know.",
    )
    path: str = Field(
        default="", description="A CLIP that the head reads pictures by: a Hub id or a folder; empty: their colours."
    )
    timeout_s: float | None = Field(default=None, gt=0, description="A vote that takes longer is none; null: wait.")

    @model_validator(mode="after")
    def _has_votes(self) -> Self:
        if not self.ask and self.votes is None:
            raise ValueError("votes must name a file with ask=false, as nobody is asked for new ones; got null")
        return self

    @property
    def asks_people(self) -> bool:
        """Whether a person is asked."""
        return self.ask

    def within(self, folder: Path) -> Self:
        """These settings with the run's own file of votes, if no other is named."""
        return self if self.votes else self.model_copy(update={"votes": str(folder / FILE_NAME)})


def Reward(config: Config, device: str) -> Asking | Remembering:
    """Make the reward that asks a person, or the one that goes by earlier votes.

    Raises:
        UserError: the file of votes, the page's address or the CLIP cannot be had.
    """
    return Asking(config, device) if config.ask else Remembering(config, device)


class Asking:
    """Asks a person about each group of candidates."""

    def __init__(self, config: Config, device: str):
        if config.votes is None:
            raise UserError(
                f"reward {config.key} asks a person about what a run draws; give ask: false and votes: FILE.jsonl for "
                "what earlier votes say of other pictures"
            )
        try:
            from ngrpo_lora.voting.voting import Voting
        except ImportError as error:
            raise UserError(
                f"reward {config.key} needs the packages starlette and uvicorn ({error}); install them with "
                f"pip install 'ngrpo-lora[server]'"
            ) from None
        self.voting = Voting(
            Path(config.votes),
            config.host,
            config.port,
            features_of(config, device),
            config.head_votes,
            config.undo_s,
            config.open_browser,
        )

    async def __call__(self, images: Sequence[Image.Image], prompt: str) -> np.ndarray:
        """(G,) scores of a prompt's candidates, NaN where nothing was said; of a picture alone nothing can be."""
        count, given_up = len(images), threading.Event()
        if count < 2:
            return np.full(count, np.nan)
        try:
            waiting = in_thread(lambda: self.voting.wait(prompt, images, given_up.is_set))
            scores = await asyncio.shield(asyncio.wrap_future(waiting))
        finally:
            given_up.set()  # also where `timeout_s` has run out
        return np.full(count, np.nan) if scores is None else scores

    def metrics(self) -> Metrics:
        """How many votes there are, and what the head makes of them."""
        return self.voting.metrics()

    def close(self) -> None:
        """Close the page."""
        self.voting.close()


class Remembering:
    """Goes by earlier votes: the worth that the head expects of each picture."""

    def __init__(self, config: Config, device: str):
        assert config.votes is not None
        votes = VotesFile(Path(config.votes))
        self.head = Head(features_of(config, device))
        recall(votes, self.head)
        if self.head.weights is None:
            raise UserError(
                f"reward {config.key} with ask=false needs votes that prefer a picture, with their pictures in "
                f"{str(votes.pictures)!r}, but {config.votes!r} has none; vote first"
            )

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(B,) worths; only differences between pictures of one prompt mean something."""
        return self.head.worths_of(images)


def features_of(config: Config, device: str) -> Features:
    """What the head reads pictures by: the CLIP of `path`, or colours."""
    if not config.path:
        return pixel_features
    from ngrpo_lora.rewards._clip import load_clip

    clip = load_clip(config, device)
    return lambda images: clip.image_embeds(images, "squash").double().cpu().numpy()
