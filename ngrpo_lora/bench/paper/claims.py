"""What the paper claims, and what the runs of a comparison say of it.

That one method is better holds where the 95% interval of the difference over prompts lies above 0, and with three
seeds or more the one over seeds too; it is contradicted where both lie below, and else it is not settled. That two
methods are alike holds where no interval excludes 0; how wide these are is then all that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ngrpo_lora.bench.paper.methods import BASELINE
from ngrpo_lora.bench.paper.outcomes import Outcome, by_method, intervals, is_trained
from ngrpo_lora.bench.paper.tables import Table
from ngrpo_lora.evaluation.statistics import Estimate

__all__ = ["claims_table", "reached"]

Row = tuple[str, str, str, str]
"""The claim, the paper's figures, ours, and the verdict."""


@dataclass(frozen=True)
class Pair:
    """A claim about two methods: that one is better than the other, or that they are alike.

    trained: on prompts of the trained tasks (True), of those left out (False), or on all (None).
    equal: at equal compute, or after the last iteration that both have evaluated.
    """

    claim: str
    paper: str
    one: str
    other: str
    trained: bool | None = None
    equal: Literal["compute", "iterations"] = "compute"
    alike: bool = False
    reward: str = "world"


PAIRS = (
    Pair("8 DPM++ steps train as well as 25 of DDIM, at equal iterations", "HPSv2.1 0.366, 0.359", BASELINE,
         "neighbor-ddim-25", equal="iterations", alike=True),
    Pair("better than DanceGRPO on what is trained, at equal compute", "0.366, 0.371 at equal iterations", BASELINE,
         "dance", trained=True),
    Pair("better than DanceGRPO on what is not trained, at equal compute", "UnifiedReward 3.334, 3.156", BASELINE,
         "dance", trained=False),
    Pair("better than MixGRPO on what is not trained, at equal compute", "UnifiedReward 3.334, 3.257", BASELINE,
         "mix", trained=False),
    Pair("better than DiffusionNFT, at equal compute", "", BASELINE, "nft"),
    Pair("better than fine-tuning on the best of N, at equal compute", "", BASELINE, "best-of-n"),
    Pair("a radius of 0.5 is better than 1.0", "HPSv2.1 0.379, 0.364", "ablation-centre", "radius-1.0"),
    Pair("a radius of 0.5 is better than 0.1", "HPSv2.1 0.379, 0.357", "ablation-centre", "radius-0.1"),
    Pair("1 anchor is as good as 12, at equal iterations", "2 anchors 0.370, 12 0.377", "anchors-1", "anchors-12",
         equal="iterations", alike=True),
    Pair("of a reward that is easily hacked, p = 0.8 leaves more of the rest than p = 2", "UnifiedReward 3.166, 3.132",
         "vivid-p-0.8", "vivid-p-2"),
)  # fmt: skip

FASTER, FRACTION = 5.0, 0.25  # iterations of DanceGRPO in the time of one; its compute that is enough


def claims_table(outcomes: Sequence[Outcome], budget: float) -> Table | None:
    """Every claim of which the runs that it needs are complete; None where there is none.

    Args:
        budget: forward passes per sample at which compute is equal.
    """
    found = by_method(outcomes)
    rows: list[Row] = []
    if BASELINE in found and "dance" in found:
        rows += [iteration_time(found[BASELINE], found["dance"]), compute(found[BASELINE], found["dance"])]
    rows += [
        compared(pair, found[pair.one], found[pair.other], budget)
        for pair in PAIRS
        if {pair.one, pair.other} <= {*found}
    ]
    about = (
        "Differences are between held-out pictures of the same prompts, noises and training seeds, scored by the "
        "verifier: the mean, its 95% interval over prompts, and over seeds where there are several. One holds where "
        "its intervals lie above 0; “alike” holds where none excludes 0, and says no more than their width."
    )
    head = ("Neighbor GRPO (DPM++ 8)", "the paper's figures", "here", "")
    return Table("Does it hold?", about, head, tuple(rows)) if rows else None


def iteration_time(ours: Sequence[Outcome], dance: Sequence[Outcome]) -> Row:
    """How many times as long an iteration of DanceGRPO takes."""
    passes, seconds = (
        [value(theirs) / value(own) for own, theirs in paired(ours, dance)]
        for value in (
            lambda outcome: outcome.spent()[outcome.last] / outcome.last,
            lambda outcome: outcome.seconds()[outcome.last] / outcome.last,
        )
    )
    here = (
        f"{np.mean(seconds):.1f} times ({min(seconds):.1f} to {max(seconds):.1f}); {np.mean(passes):.1f} times the "
        "forward passes"
    )
    claim = f"an iteration of DanceGRPO takes at least {FASTER:g} times as long"
    return claim, "5.3 times", here, "holds" if min(seconds) >= FASTER else "does not hold"


def compute(ours: Sequence[Outcome], dance: Sequence[Outcome]) -> Row:
    """With what part of its compute the final reward of DanceGRPO is reached."""
    parts = [reached(own, theirs) for own, theirs in paired(ours, dance)]
    good = sum(part <= FRACTION for part in parts)
    here = ", ".join("not reached" if part == np.inf else f"{part:.2f} of it" for part in parts)
    verdict = "holds" if good == len(parts) else "does not hold" if not good else f"on {good} of {len(parts)} seeds"
    return f"DanceGRPO's final reward with at most {FRACTION:g} of its compute", "Fig. 5", here, verdict


def reached(ours: Outcome, theirs: Outcome) -> float:
    """The part of `theirs`' forward passes after which an evaluation of ours has its final reward; inf if none has."""
    label = "world" if "world" in theirs.scores[0] else next(iter(theirs.scores[0]))
    wanted, spent = np.nanmean(theirs.scores[theirs.last][label]), ours.spent()
    enough = [spent[step] for step in sorted(ours.scores) if step and np.nanmean(ours.scores[step][label]) >= wanted]
    return enough[0] / theirs.spent()[theirs.last] if enough else np.inf


def compared(pair: Pair, ours: Sequence[Outcome], theirs: Sequence[Outcome], budget: float) -> Row:
    """The difference between two methods, and the verdict."""
    differences = []
    both = paired(ours, theirs)
    kept = [i for i, prompt in enumerate(ours[0].prompts) if pair.trained is None or is_trained(prompt) == pair.trained]
    for own, other in both:
        shared = max({*own.scores} & {*other.scores})
        at = (own.nearest(budget), other.nearest(budget)) if pair.equal == "compute" else (shared, shared)
        differences.append(own.scores[at[0]][pair.reward][kept] - other.scores[at[1]][pair.reward][kept])
    prompts, seeds = intervals(np.array(differences), [ours[0].prompts[i] for i in kept])
    known = [prompts, seeds] if len(both) > 2 else [prompts]
    here = prompts.show("+.3f") + (f", seeds [{seeds.low:+.3f}, {seeds.high:+.3f}]" if len(both) > 1 else "")
    return pair.claim, pair.paper, here, verdict(known, pair.alike)


def verdict(known: Sequence[Estimate], alike: bool) -> str:
    """What intervals of a difference say of a claim that it is positive, or that there is none."""
    above, below = [one.low > 0 for one in known], [one.high < 0 for one in known]
    if alike:
        return "does not hold" if any(above + below) else "holds, within these intervals"
    return "holds" if all(above) else "contradicted" if all(below) else "not settled"


def paired(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """Runs of two methods with the same training seed."""
    known = {outcome.job.seed: outcome for outcome in theirs}
    return [(outcome, known[outcome.job.seed]) for outcome in ours if outcome.job.seed in known]
