"""Settings of pushes to the Hub."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ngrpo_lora.config.section import Section

__all__ = ["HubConfig", "hub_section"]


class HubConfig(Section, frozen=True):
    """Where the adapter is pushed, with a model card. `hub=owner/name` is short for hub.repo."""

    repo: str | None = Field(
        default=None, description="Hub repository, owner/name, made when missing; null: nothing is pushed."
    )
    push: Literal["end", "checkpoints"] = Field(
        default="end", description="end: once, after training; checkpoints: also beside it, after every checkpoint."
    )
    private: bool = Field(default=False, description="A repository that is made is a private one.")
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, made when missing, or refs/pr/N; null: the default branch."
    )
    create_pr: bool = Field(default=False, description="Open a pull request; the repository must exist.")
    commit_message: str | None = Field(
        default=None, min_length=1, description="Of every push; null: what was trained, and for how long."
    )
    timeout_s: float = Field(default=1800.0, gt=0, description="A push that takes longer has failed.")

    @field_validator("repo")
    @classmethod
    def _hub_id(cls, value: str | None) -> str | None:
        if value is not None and re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", value, re.ASCII) is None:
            raise ValueError(f"must be owner/name, of letters, digits, -, _ and ., got {value!r}")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> HubConfig:
        if self.create_pr and self.revision is not None:
            raise ValueError(
                f"hub.revision must be null with hub.create_pr=true, got {self.revision!r}; a pull request is opened "
                "against the default branch, and refs/pr/N as hub.revision goes on with one"
            )
        return self


def hub_section(value: Any) -> Any:
    """Expand the short forms `owner/name` and null to the whole section."""
    return {"repo": value} if value is None or isinstance(value, str) else value
