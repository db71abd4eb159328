"""The command as a user calls it, within this process."""

from __future__ import annotations

from typer.testing import CliRunner

from ngrpo_lora.cli import app


def run(*words: object) -> list[str]:
    """What a command that succeeds prints, line by line."""
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def refuse(*words: object, lines: int = 1) -> str:
    """The message of a command that must end with status 2, no traceback and nothing printed."""
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("ngrpo: ")
    assert len(result.stderr.splitlines()) == lines
    return result.stderr
