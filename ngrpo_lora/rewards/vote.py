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

import numpy as np
from PIL import Image

from ngrpo_lora.config.rewards.vote import Config
from ngrpo_lora.errors import UserError
from ngrpo_lora.guests.calls import in_thread
from ngrpo_lora.types import Metrics
from ngrpo_lora.voting.ballots import VotesFile
from ngrpo_lora.voting.booth import recall
from ngrpo_lora.voting.head import Features, Head, pixel_features


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
                f"pip install starlette uvicorn"
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
