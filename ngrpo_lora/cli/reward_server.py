"""`ngrpo reward-server`: rewards of this machine for training on another."""

from __future__ import annotations

import contextlib
import os
from importlib.util import find_spec
from typing import Annotated

import typer

from ngrpo_lora.errors import UserError


def reward_server(
    rewards: Annotated[
        list[str],
        typer.Argument(metavar="REWARD...", help="Names, file.py:function, or as in rewards.train: '{name: ...}'."),
    ],
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine it needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8765,
    device: Annotated[str, typer.Option(help="Where networks run: auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Serve rewards to the reward `remote` of another machine. NGRPO_REWARD_TOKEN is the secret that both share."""
    from ngrpo_lora.config import load_config

    resolved = load_config(overrides=[f"rewards.train=[{', '.join(rewards)}]", f"model.device={device}"])

    if absent := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UserError(
            f"the reward server needs {' and '.join(absent)}; install what it needs with pip install starlette uvicorn"
        )

    from ngrpo_lora.devices import resolve_device
    from ngrpo_lora.rewards._http import TOKEN_ENV
    from ngrpo_lora.scoring.server import RewardServer

    token = os.environ.get(TOKEN_ENV)
    server = RewardServer(resolved.rewards.train, host, port, resolve_device(resolved.model.device), token)
    typer.echo(f"serving {', '.join(server.scorer.rewards)} at {server.url}; Ctrl-C ends it")
    with contextlib.suppress(KeyboardInterrupt):
        server.serve()
