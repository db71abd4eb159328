"""Votes as pairs of pictures, for trainers that learn from these: which was preferred to which, for what prompt."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ngrpo_lora.config.rewards.vote import FILE_NAME
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import to_line
from ngrpo_lora.voting.ballots import Ballot, VotesFile
from ngrpo_lora.voting.head import accuracy
from ngrpo_lora.voting.preferences import choices_of

__all__ = ["described", "found_votes", "pairs_of", "save_pairs"]


def found_votes(path: Path) -> VotesFile:
    """The votes of a file, or of a run's folder.

    Raises:
        ConfigError: there are none.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.exists():
        raise ConfigError(
            f"votes must be a file of votes or the folder of a run that has {FILE_NAME}, got {str(path)!r}"
        )
    return VotesFile(file)


def pairs_of(ballot: Ballot) -> list[tuple[str, str]]:
    """The pairs of pictures, (preferred, other), that a vote says; none that it also says the other way round."""
    said = [(choice.better, other) for choice in choices_of(ballot.orders) for other in choice.worse]
    kept = [(better, worse) for better, worse in dict.fromkeys(said) if (worse, better) not in said]
    return [(ballot.pictures[better], ballot.pictures[worse]) for better, worse in kept]


def save_pairs(votes: VotesFile, path: Path) -> int:
    """Write all pairs as JSON lines of prompt, chosen and rejected, with paths from the file's folder; how many.

    Raises:
        ConfigError: `path` is a folder.
    """
    if path.is_dir():
        raise ConfigError(f"--pairs must be a file to write, but {str(path)!r} is a folder; add a name")
    count = 0
    with written(path) as partial, partial.open("w", encoding="utf-8") as file:
        for ballot in votes.ballots.values():
            for names in pairs_of(ballot):
                chosen, rejected = (os.path.relpath(votes.picture(name), path.parent) for name in names)
                file.write(to_line({"prompt": ballot.prompt, "chosen": chosen, "rejected": rejected}))
                count += 1
    return count


def described(votes: VotesFile) -> Iterator[str]:
    """What a file of votes holds, in lines of text."""
    ballots = [*votes.ballots.values()]
    said = Counter(ballot.said for ballot in ballots)
    pairs, judged = sum(len(pairs_of(ballot)) for ballot in ballots), accuracy(ballots)
    yield (
        f"votes      {len(ballots)}: {said['order']} that prefer pictures, {said['none']} none of them, "
        f"{said['skip']} skipped"
    )
    yield f"pairs      {pairs}"
    if judged.count:
        yield f"head       foresaw {judged.share:.0%} of the pairs of the last {judged.count} votes before it knew them"
    if votes.damaged:
        yield f"damaged    lines {', '.join(map(str, votes.damaged))} cannot be read; all others count"
