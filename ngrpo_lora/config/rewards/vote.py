"""Settings of voting, for `rewards/vote.py`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from ngrpo_lora.config.paths import PathText
from ngrpo_lora.config.plugins import ClipConfig

FILE_NAME = "votes.jsonl"


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
