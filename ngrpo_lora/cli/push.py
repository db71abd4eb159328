"""`ngrpo push`: a run to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ngrpo_lora.errors import ConfigError


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a run.", show_default=False)],
    repo: Annotated[str | None, typer.Option(help="owner/name; default: the run's own hub.repo.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a repository that is made.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made when missing, or refs/pr/N.")] = None,
    pull_request: Annotated[
        bool | None, typer.Option("--pull-request/--no-pull-request", help="Open one.", show_default=False)
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Push a run to the Hub: its newest adapter, with model card, pictures, curve and figures."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"RUN must be the output folder of a run, but {str(run)!r} holds no config.yaml")

    from ngrpo_lora.config import load_config

    given = {"repo": repo, "private": private, "revision": revision, "create_pr": pull_request}
    given["commit_message"] = message
    overrides = [
        f"hub.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None
    ]
    hub = load_config(run / "config.yaml", overrides).hub
    if hub.repo is None:
        raise ConfigError("--repo must be given, as the run's hub.repo is null; for example --repo owner/name")

    from ngrpo_lora.hub.pushing import push_run

    typer.echo(push_run(run, hub))
