"""What the paper claims, and what the runs of a comparison say of it.

A difference is settled where its 95% interval over prompts excludes 0 and, with three seeds or more, the one over seeds
too. That one method is as good as another holds where no interval goes below minus `MARGIN`. Fewer runs than were asked
for settle nothing, and neither do runs whose learning rates were not searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ngrpo_lora.bench.paper.methods import BASELINE
from ngrpo_lora.bench.paper.outcomes import Outcome, by_method, intervals, is_trained, paired
from ngrpo_lora.bench.paper.plan import Plan
from ngrpo_lora.bench.paper.tables import Table
from ngrpo_lora.evaluation.statistics import Estimate

__all__ = ["claims_table", "reached", "verdict"]

MARGIN = 0.02
"""The loss of reward that “as good as” allows."""

FASTER, FRACTION = 5.0, 0.25  # a DanceGRPO iteration in iterations of ours; the part of its compute that is enough
ENOUGH = 3  # seeds whose spread says something

Row = tuple[str, str, str, str]
"""The claim, the verdict, our figures, and the paper's."""

Runs = Sequence[tuple[Outcome, Outcome]]
"""Runs of two methods with the same training seed."""


@dataclass(frozen=True)
class Pair:
    """A claim about two methods: that the first is better than the second, or as good.

    trained: on prompts of the trained tasks (True), of those left out (False), or on all (None).
    score: the label of another score than the verifier's graded one.
    equal: at equal compute, after the last iteration that both have evaluated, or where the first reward that both
        were trained on is as high with the second as it is at the end of the first.
    """

    claim: str
    paper: str
    first: str
    second: str
    trained: bool | None = None
    equal: Literal["compute", "iterations", "reward"] = "compute"
    as_good: bool = False
    score: str | None = None


NOT_THERE = "not in the paper"

PAIRS = (
    Pair("8 DPM++ steps train as well as 25 of DDIM, at equal iterations", "HPSv2.1 0.366, 0.359", BASELINE,
         "neighbor-ddim-25", equal="iterations", as_good=True),
    Pair("better than DanceGRPO (25 steps) on trained tasks", "HPSv2.1 0.366, 0.371: not better", BASELINE,
         "dance", trained=True),
    Pair("better than DanceGRPO (25 steps) on tasks left out", "UnifiedReward 3.334, 3.156", BASELINE,
         "dance", trained=False),
    Pair("better than DanceGRPO (16 steps, as in its code), all tasks", NOT_THERE, BASELINE, "dance-16"),
    Pair("better than MixGRPO on tasks left out", "UnifiedReward 3.334, 3.257", BASELINE, "mix", trained=False),
    *(
        Pair(f"better than {name}, all tasks", NOT_THERE, BASELINE, other)
        for other, name in (("dance", "DanceGRPO (25 steps)"), ("flow-grpo", "Flow-GRPO (10 steps)"),
                            ("flow-cps", "Flow-CPS"), ("mix-flash", "MixGRPO-Flash"), ("branch", "BranchGRPO"))
    ),
    Pair("better than DiffusionNFT, all tasks", NOT_THERE, BASELINE, "nft"),
    Pair("better than fine-tuning on the best of N, all tasks", NOT_THERE, BASELINE, "best-of-n"),
    Pair("a radius of 0.5 is better than 1.0", "HPSv2.1 0.379, 0.364", "ablation-centre", "radius-1.0"),
    Pair("a radius of 0.5 is better than 0.1", "HPSv2.1 0.379, 0.357", "ablation-centre", "radius-0.1"),
    Pair("2 anchors are as good as 12, at equal iterations", "HPSv2.1 0.370, 0.377", "anchors-2", "anchors-12",
         equal="iterations", as_good=True),
    Pair("1 anchor is as good as 12, at equal iterations", NOT_THERE, "anchors-1", "anchors-12",
         equal="iterations", as_good=True),
    Pair("p = 0.8 leaves more of what is not rewarded than p = 2, at equal vividness", "UnifiedReward 3.166, 3.132",
         "vivid-p-0.8", "vivid-p-2", equal="reward"),
    *(
        Pair(f"of four steps: {claim} {name}", NOT_THERE, "turbo-neighbor", f"turbo-{other}", score=score)
        for other, name in (("flow-grpo", "Flow-GRPO"), ("flow-cps", "Flow-CPS"), ("dance", "DanceGRPO"),
                            ("nft", "DiffusionNFT"))
        for claim, score in (("better than", None), ("nearer to what the renderer can draw than", "world_manifold"))
    ),
)  # fmt: skip


def claims_table(plan: Plan, outcomes: Sequence[Outcome]) -> Table | None:
    """Every claim of which the runs that it needs are there; None where there is none."""
    found = by_method(outcomes)
    rows: list[Row] = []
    if both := paired(found.get(BASELINE, []), found.get("dance", [])):
        rows += [iteration_time(both), compute(plan, both)]
    for pair in PAIRS:
        if both := paired(found.get(pair.first, []), found.get(pair.second, [])):
            rows.append(compared(plan, pair, both))
    about = (
        "Of Neighbor GRPO with 8 DPM++ steps, at equal compute unless said. Differences are between held-out pictures "
        "of the same prompts, noises and training seeds, scored by the verifier, with 95% intervals over scenes and "
        f"over seeds. “As good” allows a loss of {MARGIN:g}. Intervals are not adjusted for the number of rows: of "
        "twenty that are about nothing, one is expected to exclude 0."
    )
    head = ("claim", "verdict", "here", "the paper's figures")
    return Table("Does it hold?", about, head, tuple(rows)) if rows else None


def iteration_time(runs: Runs) -> Row:
    """How many times as long an iteration of DanceGRPO takes."""
    passes, seconds = (
        [each(theirs)[theirs.last] / theirs.last * own.last / each(own)[own.last] for own, theirs in runs]
        for each in (Outcome.spent, Outcome.seconds)
    )
    here = (
        f"{np.mean(seconds):.1f} times ({min(seconds):.1f} to {max(seconds):.1f}), rewards and decoding included; "
        f"{np.mean(passes):.1f} times the forward passes"
    )
    claim = f"an iteration of DanceGRPO (25 steps) takes at least {FASTER:g} times as long"
    return claim, "holds" if min(seconds) >= FASTER else "does not hold", here, "5.3 times"


def compute(plan: Plan, runs: Runs) -> Row:
    """With what part of its compute the final reward of DanceGRPO is reached."""
    claim = f"DanceGRPO's (25 steps) final reward with at most {FRACTION:g} of its compute"
    gains = [theirs.scores[theirs.last][label := theirs.graded] - theirs.scores[0][label] for _, theirs in runs]
    if not intervals(np.array(gains), runs[0][1].prompts)[0].low > 0:
        return claim, "not settled", "DanceGRPO has not improved", "Fig. 5"
    parts = [reached(own, theirs) for own, theirs in runs]
    good = sum(part <= FRACTION for part in parts)
    here = ", ".join("not reached" if part == np.inf else f"{part:.2f} of it" for part in parts)
    found = "holds" if good == len(parts) else "does not hold" if not good else f"on {good} of {len(parts)} seeds"
    return claim, limited(plan, len(runs), found), here, "Fig. 5"


def reached(ours: Outcome, theirs: Outcome) -> float:
    """The part of `theirs`' forward passes after which our evaluations stay at its final reward; inf where none do."""
    label, spent = theirs.graded, ours.spent()
    wanted, part = np.nanmean(theirs.scores[theirs.last][label]), np.inf
    for step in sorted(ours.scores, reverse=True):
        if np.nanmean(ours.scores[step][label]) < wanted:
            break
        part = spent[step] / theirs.spent()[theirs.last]
    return part


def compared(plan: Plan, pair: Pair, runs: Runs) -> Row:
    """The difference between two methods, and the verdict."""
    prompts = runs[0][0].prompts
    kept = [i for i, prompt in enumerate(prompts) if pair.trained is None or is_trained(prompt) == pair.trained]
    label = pair.score or runs[0][0].graded
    differences = []
    for own, other in runs:
        first, second = steps_of(plan, pair, own, other)
        differences.append(own.scores[first][label][kept] - other.scores[second][label][kept])
    over_prompts, over_seeds = intervals(np.array(differences), [prompts[i] for i in kept])
    here = over_prompts.show("+.3f")
    here += f", seeds [{over_seeds.low:+.3f}, {over_seeds.high:+.3f}]" if len(runs) > 1 else ""
    known = [over_prompts, over_seeds] if len(runs) >= ENOUGH else [over_prompts]
    return pair.claim, limited(plan, len(runs), verdict(known, pair.as_good)), here, pair.paper


def steps_of(plan: Plan, pair: Pair, first: Outcome, second: Outcome) -> tuple[int, int]:
    """The iterations at which two runs are compared."""
    if pair.equal == "compute":
        return first.nearest(plan.budget), second.nearest(plan.budget)
    if pair.equal == "iterations":
        shared = max({*first.scores} & {*second.scores})
        return shared, shared
    label = first.job.config.rewards.train[0].key
    wanted = np.nanmean(first.scores[first.last][label])
    below = [step for step in second.scores if np.nanmean(second.scores[step][label]) <= wanted]
    return first.last, max(below, default=0)


def verdict(known: Sequence[Estimate], as_good: bool) -> str:
    """What intervals of a difference say of a claim that it is positive, or that it is no loss."""
    least = -MARGIN if as_good else 0.0
    if all(one.low > least for one in known):
        return "holds"
    return "does not hold" if all(one.high < least for one in known) else "not settled"


def limited(plan: Plan, seeds: int, found: str) -> str:
    """A verdict, as far as the runs go."""
    if not plan.search:
        return "no verdict: learning rates were not searched"
    if seeds < plan.seeds:
        return f"no verdict: {seeds} of {plan.seeds} seeds"
    return found if seeds >= ENOUGH else f"{found}, on {'one seed' if seeds == 1 else f'{seeds} seeds'} alone"
