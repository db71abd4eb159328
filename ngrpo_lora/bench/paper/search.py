"""The search for every method's learning rate and knob: the point with the greatest reward on training captions.

It is the same for all methods: rates first, on both sides of the best one where there are any left, then the knob, in
runs of a quarter of the length; then the best point goes the whole length, and so do lower rates while they do better
there: a rate that is best over a short run may be one that a long run does not survive.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ngrpo_lora.bench.paper.given import RATE, is_entry, point_of
from ngrpo_lora.bench.paper.methods import LEARNING_RATES, Method
from ngrpo_lora.bench.paper.outcomes import read
from ngrpo_lora.bench.paper.plan import Job, Length, Plan, Tuned, points, search_job
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.statistics import Estimate, mean_interval
from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import finite
from ngrpo_lora.world.meanings import meaning_of

__all__ = ["FILE", "choose", "finals", "jobs", "kept", "trials", "tuned", "write"]

FILE = "tuning.json"
NONE = Estimate(math.nan, math.nan, math.nan)

Point = tuple[str, str]
"""Learning rate and knob."""

Found = Mapping[Point, Estimate]
"""The validation rewards of a method's points; NaN where a run failed, or no picture had a reward."""


def trials(method: Method, found: Found) -> list[Point]:
    """The points that a method's search tries, as far as its rewards so far tell, in the order of the grid.

    First the three middle learning rates, with the method's usual knob; while the best of them is the lowest or the
    highest, the next one beyond; then the knob's other values, with the best rate.
    """
    usual = method.untuned[1]
    first, last = 1, len(LEARNING_RATES) - 2
    while True:
        tried = [(rate, usual) for rate in LEARNING_RATES[first : last + 1]]
        best = None if any(point not in found for point in tried) else _greatest(tried, found)
        if best == tried[0] and first > 0:
            first -= 1
        elif best == tried[-1] and last < len(LEARNING_RATES) - 1:
            last += 1
        else:
            break
    others = [] if best is None else [(best[0], knob) for knob in method.knob_values if knob != usual]
    return sorted(tried + others, key=points(method).index)


def finals(method: Method, short: Found, whole: Found) -> list[Point]:
    """The points that go the whole length, as far as rewards tell: the best of the short runs, and lower rates.

    With the best one goes the next lower rate, and while the lowest so far is the best, the next below. None before
    all short runs are known.
    """
    if any(point not in short for point in trials(method, short)):
        return []
    best = choose(method, short)
    if best is None:
        return []
    rates, knob = LEARNING_RATES[: LEARNING_RATES.index(best[0]) + 1], best[1]
    downwards = [(rate, knob) for rate in reversed(rates)]
    going = downwards[:2]
    for below in downwards[2:]:
        if any(point not in whole for point in going) or _greatest(going, whole) != going[-1]:
            break
        going.append(below)
    return going


def jobs(plan: Plan, length: Length, failed: Collection[str] = ()) -> list[Job]:
    """The runs of the search, complete or to be made, as far as those that are complete tell; none without a search.

    Args:
        failed: names of runs that ended with an error.
    """
    wanted = []
    for method in plan.searched if plan.search else ():
        if method.name in plan.given:
            continue
        possible = [[search_job(plan, method, p, length, whole) for p in points(method)] for whole in (False, True)]
        short, whole = (_known(some, failed) for some in possible)
        tried = (trials(method, short), finals(method, short, whole))
        wanted += [job for some, ps in zip(possible, tried, strict=True) for job in some if job.point in ps]
    return wanted


def _known(jobs: Sequence[Job], failed: Collection[str]) -> Found:
    """What is known of one method's points; NaN where a run failed."""
    found = {point: estimate for each in validated(jobs).values() for point, estimate in each.items()}
    return found | {job.point: NONE for job in jobs if job.name in failed}


def validated(jobs: Iterable[Job]) -> dict[str, dict[Point, Estimate]]:
    """The validation reward of every complete run of one length, by method and point; NaN where no picture has one."""
    found: dict[str, dict[Point, Estimate]] = {}
    for outcome in read(jobs):
        rewards, scenes = outcome.rewards(outcome.last).tolist(), [*map(meaning_of, outcome.prompts)]
        found.setdefault(outcome.job.method, {})[outcome.job.point] = mean_interval(rewards, scenes)
    return found


def _points(method: Method, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """What `tuning.json` says of each point of a method: the rewards of its short run and of its whole one, if any."""
    rows: dict[Point, dict[str, Any]] = {
        point: {RATE: point[0], method.knob: point[1]} for point in points(method) if point in {j.point for j in jobs}
    }
    for whole, prefix in ((False, ""), (True, "whole_")):
        some = [job for job in jobs if job.whole == whole]
        found = _known(some, ())
        for job in some:
            reward = found.get(job.point, NONE)
            half = (reward.high - reward.low) / 2
            rows[job.point] |= {f"{prefix}validation_reward": reward.value, f"{prefix}half_interval": half}
    return [*rows.values()]


def choose(method: Method, rewards: Found) -> Point | None:
    """The point with the greatest reward; of equal ones the first of the grid, which has the lowest learning rate.

    None where no point has a reward.
    """
    return _greatest(points(method), rewards)


def _greatest(points: Sequence[Point], rewards: Found) -> Point | None:
    scored = [point for point in points if point in rewards and not math.isnan(rewards[point].value)]
    return max(scored, key=lambda point: rewards[point].value) if scored else None


def tuned(plan: Plan, jobs: Sequence[Job]) -> dict[str, Point]:
    """Each searched method's winner, here or in an earlier comparison, or its untuned values where it has none.

    It is the best of the runs of whole length, where any is known, or else of the short ones. Where runs of the tables
    have begun, their method's winner stays what it was, whatever the search has found since.
    """
    known = {name: point_of(entry) for name, entry in plan.given.items()} | kept(plan)
    found = [validated(job for job in jobs if job.whole == whole) for whole in (True, False)]
    chosen = {m.name: [choose(m, some.get(m.name, {})) for some in found] for m in plan.searched}
    return {m.name: known.get(m.name) or next(filter(None, chosen[m.name]), m.untuned) for m in plan.searched}


def kept(plan: Plan) -> dict[str, Point]:
    """The winners in `tuning.json` of methods of which the tables' runs have begun.

    Raises:
        ConfigError: the file cannot be read, or an earlier comparison has found other values for one of them.
    """
    entries = {entry["method"]: entry for entry in entries_of(plan)}
    begun = {method.tuned_as for method in plan.methods if (Path(plan.output_dir) / "runs" / method.name).is_dir()}
    winners = [method for method in plan.searched if method.name in begun and method.name in entries]
    found = {method.name: point_of(entries[method.name]) for method in winners}
    for name in found.keys() & plan.given.keys():
        if (given := point_of(plan.given[name])) != found[name]:
            raise ConfigError(
                f"--tuned-by must have the values that runs of {name} were begun with ({' and '.join(found[name])}), "
                f"got {' and '.join(given)}; leave it out, or give another --output-dir"
            )
    return found


def entries_of(plan: Plan) -> list[dict[str, Any]]:
    """The entries that `tuning.json` holds, one a method; none where there is no such file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    path = Path(plan.output_dir) / FILE
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        wrong = None if isinstance(entries, list) and all(map(is_entry, entries)) else "it holds something else"
    except (OSError, ValueError) as error:
        entries, wrong = [], str(error)
    if wrong:
        raise ConfigError(
            f"{str(path)!r} must hold the winners of the search as JSON, but cannot be read ({wrong}); remove it, and "
            "the search's runs give them again"
        )
    return entries


def write(plan: Plan, jobs: Sequence[Job], winners: Tuned) -> list[dict[str, Any]]:
    """Write `tuning.json`: per method the winner and every point tried, with its reward.

    A method that was searched in an earlier comparison has the entry of that one, also where a later call does not name
    it. Methods of which the plan knows nothing stay in the file. Returns the entries of the others.
    """
    before, searched = entries_of(plan), {outcome.job.method for outcome in read(jobs)}
    known = {entry["method"]: entry for entry in before if entry["method"] in winners.keys() - searched}
    elsewhere = {name: e for name, e in known.items() if e["searched"] and point_of(e) == winners[name]} | {
        **plan.given
    }
    entries: list[dict[str, Any]] = [
        {**elsewhere[method.name]}
        if method.name in elsewhere
        else {
            "method": method.name,
            "label": method.label,
            "searched": method.name in searched,
            RATE: winners[method.name][0],
            method.knob: winners[method.name][1],
            "points": _points(method, [job for job in jobs if job.method == method.name]),
        }
        for method in plan.searched
    ]
    entries = finite(entries)
    others = [entry for entry in before if entry["method"] not in winners]
    with written(Path(plan.output_dir) / FILE) as partial:
        partial.write_text(json.dumps(others + entries, indent=1) + "\n", encoding="utf-8")
    return entries
