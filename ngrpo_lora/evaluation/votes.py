"""Votes that people cast on the page `blind.html`, read and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.statistics import Estimate, share_interval
from ngrpo_lora.records.texts import decoded, parse_json
from ngrpo_lora.reports.tables import markdown_table

__all__ = ["Votes", "read_votes", "votes_table"]


VOTES_FORMAT = "ngrpo-votes-1"


@dataclass(frozen=True)
class Votes:
    """Counted votes of people who chose between `label` and `reference`, blind."""

    label: str
    reference: str
    wins: int
    ties: int
    losses: int
    win_rate: Estimate


def read_votes(paths: Sequence[Path]) -> list[Votes]:
    """Read and count the votes that `blind.html` saved, of one or several people, for each adapter.

    Raises:
        ConfigError: a file is not of that page, or files are of different comparisons.
    """
    cast: dict[tuple[str, str], list[tuple[float, str]]] = {}
    comparisons = {}
    for path in paths:
        try:
            saved = parse_json(decoded(path.read_bytes(), str(path)))
            if saved["format"] != VOTES_FORMAT:
                raise ValueError
            comparisons[saved["comparison"]] = path
            for vote in saved["votes"]:
                worth = {"label": 1.0, "tie": 0.5, "reference": 0.0}[vote["choice"]]
                cast.setdefault((vote["label"], vote["reference"]), []).append((worth, vote["prompt"]))
        except OSError as error:
            raise ConfigError(f"--votes must be a file, but {str(path)!r} is not: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"--votes must be a file that blind.html saved, but {str(path)!r} is none") from None
    if len(comparisons) > 1:
        names = " and ".join(map(str, comparisons.values()))
        raise ConfigError(f"--votes must be of one comparison, but {names} are not; give each in a call of its own")
    found = []
    for (label, reference), votes in cast.items():
        worths = [worth for worth, _ in votes]
        wins, ties, losses = (worths.count(worth) for worth in (1.0, 0.5, 0.0))
        win_rate = share_interval(worths, [prompt for _, prompt in votes])
        found.append(Votes(label, reference, wins, ties, losses, win_rate))
    return found


def votes_table(votes: Sequence[Votes]) -> str:
    """The counted votes as a Markdown table, one row for each adapter."""
    rows = [(v.label, v.reference, v.win_rate.show(".0%"), v.wins, v.ties, v.losses) for v in votes]
    return markdown_table(("", "against", "preferred (95% CI)", "wins", "ties", "losses"), rows)
