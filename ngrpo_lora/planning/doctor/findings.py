"""What a check has found, as a line that holds no secret and names nobody."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

__all__ = ["Finding", "scrub"]

MAX_CHARACTERS = 300
HOMES = re.compile(r"(?:(?:/[\w.-]+)*/(?:home|Users)|[A-Za-z]:[/\\]+Users)[/\\]+[^/\\\s'\":;,)]+")
SECRETS = re.compile(r"\b(?:hf|api_org)_\w*[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+(?=@)")
SECRET_VARIABLES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: what was seen, and what to do where that is not well."""

    check: str
    verdict: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The finding as one line of the screen."""
        said = f"{self.text}; {self.remedy}" if self.remedy else self.text
        return f"{self.verdict:<8} {self.check:<16} {said}"

    def scrubbed(self) -> Self:
        """The same finding without what `scrub` takes out."""
        return type(self)(self.check, self.verdict, scrub(self.text), scrub(self.remedy))


def scrub(text: str) -> str:
    """The beginning of a text, on one line, without tokens, passwords in addresses, home folders and the host's name.

    Errors of other packages hold any of these; what the doctor prints is made to be passed on.
    """
    text = SECRETS.sub("<secret>", " ".join(text.split()))
    for name, value in os.environ.items():
        if SECRET_VARIABLES.search(name) and len(value) >= 8:
            text = text.replace(value, "<secret>")
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])", "~", text)
    text = HOMES.sub("~", text)
    host = socket.gethostname()
    if host and host != "localhost":
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "<host>", text)
    return text[:MAX_CHARACTERS]
