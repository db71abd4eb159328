"""`ngrpo votes`: what people said, counted and as pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def votes(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="A run's folder, or a file of votes.")],
    pairs: Annotated[
        Path | None,
        typer.Option(help="Write JSON lines of prompt, chosen and rejected picture to this file.", show_default=False),
    ] = None,
) -> None:
    """Count the votes that people cast while a run asked them, and write them as preference pairs."""
    from ngrpo_lora.voting.pairs import described, found_votes, save_pairs

    found = found_votes(source)
    written = [] if pairs is None else [f"written    {save_pairs(found, pairs)} pairs to {pairs}"]
    for line in (*described(found), *written):
        typer.echo(line)
