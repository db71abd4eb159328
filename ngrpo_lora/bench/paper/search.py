"""The search for every method's learning rate and knob: the point with the greatest reward on training captions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngrpo_lora.bench.paper.methods import Method
from ngrpo_lora.bench.paper.outcomes import evaluated, is_complete
from ngrpo_lora.bench.paper.plan import Job, Plan, Tuned, points
from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import finite

__all__ = ["FILE", "choose", "tuned", "write"]

FILE = "tuning.json"


def validated(jobs: Sequence[Job]) -> dict[str, dict[tuple[str, str], float]]:
    """The validation reward of every complete run of the search, by method and point; NaN where the run diverged."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for job in jobs:
        if is_complete(job):
            found.setdefault(job.method, {})[job.point] = evaluated(job.folder)
    return found


def choose(method: Method, rewards: dict[tuple[str, str], float]) -> tuple[str, str] | None:
    """The point with the greatest reward; of equal ones the first of the grid, which has the lowest learning rate.

    None where no point has a reward.
    """
    scored = [point for point in points(method) if not math.isnan(rewards.get(point, math.nan))]
    return max(scored, key=lambda point: rewards[point]) if scored else None


def tuned(plan: Plan, jobs: Sequence[Job]) -> dict[str, tuple[str, str]]:
    """Each searched method's winner, or its untuned values where there is no search or none of its runs succeeded."""
    found = validated(jobs)
    return {m.name: choose(m, found.get(m.name, {})) or m.untuned for m in plan.searched}


def write(plan: Plan, jobs: Sequence[Job], winners: Tuned) -> list[dict[str, Any]]:
    """Write `tuning.json`: per method the winner and every point tried, with its reward; returns what it holds."""
    found = validated(jobs)
    entries = [
        {
            "method": method.name,
            "label": method.label,
            "searched": bool(found.get(method.name)),
            "optimizer.learning_rate": winners[method.name][0],
            method.knob: winners[method.name][1],
            "points": [
                {
                    "optimizer.learning_rate": rate,
                    method.knob: knob,
                    "validation_reward": found.get(method.name, {}).get((rate, knob)),
                }
                for rate, knob in (points(method) if plan.search else [])
            ],
        }
        for method in plan.searched
    ]
    with written(Path(plan.output_dir) / FILE) as partial:
        partial.write_text(json.dumps(finite(entries), indent=1) + "\n", encoding="utf-8")
    return entries
