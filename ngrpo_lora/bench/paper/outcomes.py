"""What complete runs have left in their folders: what they spent, and how every held-out picture scored."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.bench.paper.cost import total
from ngrpo_lora.bench.paper.plan import TRAINED_TASKS, Job
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.statistics import Estimate, mean_interval
from ngrpo_lora.records.metrics import measured, read_metrics, read_scores
from ngrpo_lora.training.metering import STAGES, iteration_seconds
from ngrpo_lora.world.meanings import meaning_of
from ngrpo_lora.world.scenes import parse

__all__ = [
    "Change",
    "Outcome",
    "by_method",
    "change",
    "check_whole",
    "evaluated",
    "intervals",
    "is_complete",
    "is_trained",
    "paired",
    "read",
]


@dataclass(frozen=True)
class Outcome:
    """What a complete training run left: its metrics, and the scores of its held-out pictures.

    rows: its metrics, one an iteration, the first of them the evaluation of the base model alone.
    scores: of every evaluation by iteration, label and held-out picture, (N,).
    prompts: (N,), of these pictures.
    """

    job: Job
    rows: list[dict[str, Any]]
    scores: dict[int, dict[str, np.ndarray]]
    prompts: list[str]

    @property
    def last(self) -> int:
        """The number of the run's last iteration."""
        return self.rows[-1]["step"]

    @property
    def graded(self) -> str:
        """The label of the verifier's graded score, or of the first reward trained on where it is not scored."""
        return "world" if "world" in self.scores[0] else self.job.config.rewards.train[0].key

    def rewards(self, step: int) -> np.ndarray:
        """What each picture of an evaluation earned, (N,): the weighted sum of the rewards trained on."""
        trained = self.job.config.rewards.train
        return np.sum([reward.weight * self.scores[step][reward.key] for reward in trained], axis=0)

    def spent(self) -> dict[int, float]:
        """Forward passes per sample until each iteration, as counted, a trained one as three."""
        each = {row["step"]: total(row["nfe/old_per_sample"], row["nfe/theta_per_sample"]) for row in self.rows[1:]}
        return {0: 0.0} | dict(zip(each, np.cumsum([*each.values()]).tolist(), strict=True))

    def seconds(self) -> dict[int, float]:
        """Seconds of training until each iteration, without evaluations."""
        each = {row["step"]: iteration_seconds(row) for row in self.rows[1:]}
        return {0: 0.0} | dict(zip(each, np.cumsum([*each.values()]).tolist(), strict=True))

    def mean(self, key: str) -> float:
        """The mean of a metric over iterations."""
        return fmean(row[key] for row in self.rows[1:])

    def measures(self, step: int) -> dict[str, float]:
        """What `evaluation.measures` found of an evaluation's pictures, by name."""
        return measured(next(row for row in self.rows if row["step"] == step))

    def nearest(self, budget: float) -> int:
        """The evaluated iteration whose foreseen compute is nearest to a budget of forward passes per sample."""
        return min((step for step in self.scores if step), key=lambda step: abs(step * self.job.cost - budget))

    def exceeds(self) -> bool:
        """Whether it counted more forward passes than were foreseen, by more than an iteration's."""
        return self.spent()[self.last] > self.job.cost * (self.last + 1)

    def summary(self) -> dict[str, Any]:
        """What `results.json` says of a run."""
        evaluations = {
            str(step): {label: float(np.nanmean(raw)) for label, raw in scores.items()}
            for step, scores in self.scores.items()
        }
        return {
            "name": self.job.name,
            "method": self.job.method,
            "seed": self.job.seed,
            "iterations": self.last,
            "learning_rate_and_knob": [*self.job.point],
            "forward_passes_per_sample_foreseen": self.job.cost * self.last,
            "forward_passes_per_sample_counted": self.spent()[self.last],
            "nfe_old": self.mean("nfe/old_per_sample"),
            "nfe_theta": self.mean("nfe/theta_per_sample"),
            "seconds": {stage: self.mean(f"time/{stage}_s") for stage in STAGES},
            "evaluations": evaluations,
            "measures": {str(step): self.measures(step) for step in self.scores},
        }


def is_complete(job: Job) -> bool:
    """Whether a run has all its iterations, its last evaluation and its adapter."""
    metrics = job.folder / "metrics.jsonl"
    if not metrics.is_file() or not (job.folder / "adapter" / FILE_NAME).is_file():
        return False
    last = (read_metrics(metrics) or [{}])[-1]
    return last.get("step") == job.config.trainer.num_iterations and "eval/reward_mean" in last


def check_whole(job: Job) -> None:
    """Make sure that a complete run has kept what it left: every iteration, and all scores of every evaluation.

    Raises:
        ConfigError: some is missing or cannot be read.
    """
    rows = read_metrics(job.folder / "metrics.jsonl")
    evaluated = [row["step"] for row in rows if "eval/reward_mean" in row]
    try:
        scores = read_scores(job.folder)
    except (IndexError, KeyError, ValueError):  # an empty file, a line without all scores, no text
        scores = {}
    pictures = {len(values) for evaluation in scores.values() for values in evaluation.values()}
    whole = [row["step"] for row in rows] == [*range(len(rows))] and evaluated == [*scores] and len(pictures) == 1
    if not whole or not (job.folder / "config.yaml").is_file():
        raise ConfigError(
            f"runs of a comparison must be whole, but of {str(job.folder)!r} some lines of metrics.jsonl, files of "
            "evaluations/ or config.yaml are missing; remove that folder, and the same command makes the run again"
        )


def read(jobs: Iterable[Job]) -> list[Outcome]:
    """The outcomes of the jobs that are complete, in their order."""
    found = []
    for job in jobs:
        if is_complete(job):
            first = min((job.folder / "evaluations").glob("*.jsonl"))
            prompts = [row["prompt"] for row in read_metrics(first)]
            found.append(Outcome(job, read_metrics(job.folder / "metrics.jsonl"), read_scores(job.folder), prompts))
    return found


def by_method(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by method, one a seed."""
    found: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        found[outcome.job.method].append(outcome)
    return dict(found)


def paired(first: Sequence[Outcome], second: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """The runs of two methods that have the same training seed."""
    known = {outcome.job.seed: outcome for outcome in second}
    return [(outcome, known[outcome.job.seed]) for outcome in first if outcome.job.seed in known]


@dataclass(frozen=True)
class Change:
    """How a score changed from the base model to a trained one, on the same prompts and seeds.

    over_prompts: the mean change with its interval over prompts; a prompt's value is its mean over the runs' seeds.
    over_seeds: the same mean with its interval over the runs' seeds.
    """

    before: float
    after: float
    over_prompts: Estimate
    over_seeds: Estimate
    pictures: int

    def show(self) -> str:
        """The score after, and its change with intervals, as text."""
        low, high = self.over_seeds.low, self.over_seeds.high
        seeds = "" if np.isnan(low) else f", seeds [{low:+.3f}, {high:+.3f}]"
        return f"{self.after:.3f} ({self.over_prompts.show('+.3f')}{seeds})"


def change(outcomes: Sequence[Outcome], steps: Mapping[str, int], label: str, trained: bool | None = None) -> Change:
    """The change of a score over the seeds of one method.

    Args:
        steps: the iteration that is compared with the base, by the name of the run.
        trained: prompts of tasks that were trained (True), of those left out (False), or all (None).
    """
    prompts = outcomes[0].prompts
    kept = [i for i, prompt in enumerate(prompts) if trained is None or is_trained(prompt) == trained]
    before = np.array([outcome.scores[0][label][kept] for outcome in outcomes])  # (S, N)
    after = np.array([outcome.scores[steps[outcome.job.name]][label][kept] for outcome in outcomes])
    over_prompts, over_seeds = intervals(after - before, [prompts[i] for i in kept])
    return Change(float(np.nanmean(before)), float(np.nanmean(after)), over_prompts, over_seeds, len(kept))


def intervals(differences: np.ndarray, prompts: Sequence[str]) -> tuple[Estimate, Estimate]:
    """The mean of differences (S, N) of S seeds and N pictures, with its interval over prompts and over seeds.

    Wordings of one scene count as one draw. A picture whose reward failed is left out.
    """
    known = np.ma.masked_invalid(differences)
    pictures, seeds = (known.mean(axis).filled(math.nan).tolist() for axis in (0, 1))
    return mean_interval(pictures, [*map(meaning_of, prompts)]), mean_interval(seeds, [*range(len(seeds))])


def is_trained(prompt: str) -> bool:
    """Whether the task of a prompt is one that is trained; prompts that are none of the world's all count as that."""
    try:
        return parse(prompt).task in TRAINED_TASKS
    except ValueError:
        return True


def evaluated(folder: Path) -> tuple[float, float]:
    """The first and the last held-out reward of a run, NaN where no picture had a score."""
    values = [row["eval/reward_mean"] for row in read_metrics(folder / "metrics.jsonl") if "eval/reward_mean" in row]
    first, last = (math.nan if value is None else value for value in (values[0], values[-1]))
    return first, last
