"""What votes are worth: runs that are taught by a simulated voter, of whom taste and mistakes are known.

`ngrpo bench vote` starts a run of the preset `demo-vote` for each seed. The voter votes at the run's page, as a browser
does: it names the best and the worst of each group, and each word is wrong with a given probability. Measured is the
share of held-out pictures that are to its taste, before the first vote and after the last.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ngrpo_lora.config import RunConfig, load_config
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.guests.calls import in_thread
from ngrpo_lora.planning.preflight import check_run
from ngrpo_lora.records.metrics import read_metrics, series
from ngrpo_lora.records.ownership import owned
from ngrpo_lora.reports.tables import markdown_table
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete
from ngrpo_lora.voting.simulated import TASTES, Voter, vote_at

__all__ = ["Outcome", "configured", "taught", "vote_table"]

OWN = ("rewards", "evaluation.rewards", "evaluation.measures", "seed", "output_dir", "resume")
"""What every run has of this bench, so that no two are mixed."""

HEAD = ("taste", "wrong", "seed", "votes", "to taste before", "after", "rise, points", "head foresaw", "world")


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    wrong: the probability that a word of the voter is wrong.
    before, after: the share of held-out pictures to the voter's taste.
    world_before, world_after: what the verifier says of the same pictures, which nobody voted on.
    foreseen: the share of the pairs of the last votes that the head had right before it knew of them.
    """

    taste: str
    wrong: float
    seed: int
    votes: int
    before: float
    after: float
    world_before: float
    world_after: float
    foreseen: float


def configured(taste: str, wrong: float, seed: int, folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The preset for a simulated voter; a run that was begun is gone on with.

    Raises:
        ConfigError: an override of what the bench sets for itself.
    """
    for key in (text.partition("=")[0].strip() for text in overrides):
        if key in OWN or key.startswith("rewards.") or key == "evaluation":
            raise ConfigError(
                f"{key} must be left to `ngrpo bench vote`, which sets it for every run; others can be given one by "
                "one, such as evaluation.num_prompts=60"
            )
    own = [
        "rewards.train={name: vote, open_browser: false, undo_s: 0}",
        f"evaluation.rewards=[world, {{name: 'ngrpo_lora.voting.simulated:is_{taste}', label: to_taste}}]",
        "evaluation.measures=[]",
        f"seed={seed}",
        f"output_dir={folder / f'{taste}-{100 * wrong:.10g}-{seed}'}",
        "resume=auto",
    ]
    return load_config("demo-vote", [*own, *overrides])


def taught(config: RunConfig, taste: str, wrong: float) -> Outcome:
    """Run a configuration to its end, taught by a simulated voter.

    Raises:
        UserError: the run cannot start or go on.
    """
    check_run(config)
    run, done = prepare(config), threading.Event()
    with closing(run.scorer):
        assert run.scorer.voting is not None
        voter = Voter(TASTES[taste], wrong, derive_seed(config.seed, "voter", run.iteration))
        in_thread(partial(vote_at, run.scorer.voting.address, voter, done.is_set))
        try:
            complete(run)
        finally:
            done.set()
    rows = read_metrics(run.output_dir / "metrics.jsonl")
    to_taste, world = (series(rows, f"eval/{label}_mean") for label in ("to_taste", "world"))
    ends = (to_taste[0][1], to_taste[-1][1], world[0][1], world[-1][1])
    votes = series(rows, "rollout/vote/votes")[-1][1]
    known = series(rows, "rollout/vote/head_accuracy")  # none where the votes were too few to learn from
    return Outcome(taste, wrong, config.seed, int(votes), *ends, known[-1][1] if known else math.nan)


def vote_table(
    taste: str,
    wrongs: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
    overrides: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Print a table with a row for each probability of a wrong word and each seed, of the runs that are complete.

    Raises:
        UserError: the folder is in use, or a run cannot start or go on; the rows before it are printed.
    """
    runs = [(wrong, configured(taste, wrong, seed, folder, overrides)) for wrong in wrongs for seed in seeds]
    for _, config in runs:
        check_run(config)
    rows = []
    try:
        with owned(folder):
            for wrong, config in runs:
                rows.append(cells(taught(config, taste, wrong)))
    finally:
        if rows:
            say(markdown_table(HEAD, rows))


def cells(found: Outcome) -> list[str]:
    """A row of the table."""
    rise = f"{100 * (found.after - found.before):+.1f}"
    world = f"{found.world_before:.3f} → {found.world_after:.3f}"
    shares = (f"{share:.1%}" for share in (found.before, found.after))
    foreseen = "" if math.isnan(found.foreseen) else f"{found.foreseen:.0%}"
    return [found.taste, f"{100 * found.wrong:g}%", str(found.seed), str(found.votes), *shares, rise, foreseen, world]
