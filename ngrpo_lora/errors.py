"""Errors that a user can act on: the command shows their message alone and exits with status 2."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["ConfigError", "OutOfMemory", "SharedError", "UserError", "first_line"]


class UserError(Exception):
    """Something outside the code is wrong (a file, a setting, a model); the message says what to do."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run: one line per problem, each with rule, value and remedy."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class SharedError(UserError):
    """An error that every process of a run has; the main process shows it for all."""


class OutOfMemory(UserError):
    """Memory runs out although as little as possible is computed at once.

    reason: what the device said.
    """

    def __init__(self, key: str, size: int, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"{key} must fit into memory, but {size} does not ({reason}); most effective first: "
            "trainer.gradient_checkpointing=true, model.text_encoders=cache, model.vae_tiling=true, "
            f"model.swap_blocks=20, or a smaller {key} where it is above 1; these may change with resume=latest, while "
            "model.quantization=nf4 or a smaller model.height_px is a new run; `ngrpo plan` says what each needs"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where there is no message."""
    try:
        return next(iter(str(error).splitlines()), type(error).__name__)
    except Exception:  # an error of a user's own class, whose text fails as well
        return type(error).__name__
