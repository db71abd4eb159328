"""Whether a run's figures are where those of a healthy run are: what to look at, and warnings where they are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ngrpo_lora.evaluation.report.record import Record
from ngrpo_lora.records.metrics import has_same_prompts, series

__all__ = ["FIGURES", "Figure", "Finding", "findings", "recent", "warnings"]

RECENT_SHARE, FEWEST = 0.1, 5  # of the iterations, by which a run is judged


@dataclass(frozen=True)
class Figure:
    """A metric of the policy, what a healthy run shows, and how one that is not is told.

    is_wrong: of the recent mean and the group's size, whether it leaves the healthy range.
    """

    key: str
    title: str
    label: str
    healthy: str
    is_wrong: Callable[[float, int], bool]
    warning: str


FIGURES = (
    Figure(
        "policy/clip_fraction",
        "Clip fraction",
        "share of anchors",
        "Healthy: under a half, and falling with the learning rate; what is clipped no longer moves the adapter.",
        lambda value, _: value > 0.5,
        "Most of the loss is clipped ({value:.0%}): an iteration wants to go further than algorithm.clip_range allows. "
        "Lower optimizer.learning_rate or algorithm.updates_per_rollout.",
    ),
    Figure(
        "policy/max_abs_log_ratio",
        "Largest |log-ratio|",
        "|log-ratio|",
        "Healthy: well under 1; the policy that learns is still close to the one that drew the pictures.",
        lambda value, _: value > 1,
        "The policy runs away from the one that drew the pictures (|log-ratio| {value:.3g}): what it learns from them "
        "is no longer sound. Lower optimizer.learning_rate or algorithm.updates_per_rollout.",
    ),
    Figure(
        "policy/entropy",
        "Entropy of the policy",
        "nats",
        "Healthy: steady, and not far below its largest value, the logarithm of the group's size.",
        lambda value, size: value < 0.25 * math.log(size),
        "The policy's choice among the candidates is nearly settled (entropy {value:.3g}): most of them teach nothing. "
        "Raise algorithm.temperature, or set it to auto.",
    ),
    Figure(
        "rollout/zero_spread_share",
        "Groups that are flat",
        "share of groups",
        "Healthy: under a half; a group of equal rewards teaches nothing.",
        lambda value, _: value > 0.5,
        "In most groups all candidates have one reward ({value:.0%} are flat), and teach nothing. Take a finer reward, "
        "other prompts or a larger algorithm.perturbation_strength.",
    ),
)
ALL_FLAT = (
    "All groups are flat: no candidate has another reward than the rest of its group, so nothing is learned. Take a "
    "finer reward, other prompts or a larger algorithm.perturbation_strength."
)


class Finding(NamedTuple):
    """What a healthy run would not show: the metric or reward, and a sentence about it."""

    about: str
    sentence: str


def warnings(record: Record) -> list[str]:
    """A sentence for every figure of a run that a healthy run would not show."""
    found = *findings(record.rows, record.config.rollout.group_size), *hacking(record)
    return [finding.sentence for finding in found]


def findings(rows: Sequence[Mapping[str, Any]], group_size: int) -> Iterator[Finding]:
    """Give what the metrics of a run's iterations, one row each, show that those of a healthy run would not."""
    for figure in FIGURES:
        value = recent(rows, figure.key)
        if figure.key == "rollout/zero_spread_share" and value == 1:
            yield Finding(figure.key, ALL_FLAT)
        elif value is not None and figure.is_wrong(value, group_size):
            yield Finding(figure.key, figure.warning.format(value=value))
    if skipped := recent(rows, "policy/skipped_updates"):
        yield Finding(
            "policy/skipped_updates",
            f"Updates are skipped, {skipped:.3g} an iteration, as losses or gradients are not finite. Lower "
            "optimizer.learning_rate.",
        )
    if failed := recent(rows, "rollout/failed_share"):
        yield Finding(
            "rollout/failed_share", f"Rewards have no score for {failed:.1%} of the pictures; the log says why."
        )


def hacking(record: Record) -> Iterator[Finding]:
    """Give every watched reward that gets worse, beyond its interval, while the trained one rises."""
    rewards = [value for _, value in series(record.rows, "eval/reward_mean")]
    if len(rewards) < 2 or rewards[-1] <= rewards[0] or not has_same_prompts(record.folder):
        return
    trained = {reward.key for reward in record.trained}
    lower_is_better = {reward.key for reward in record.config.evaluation.rewards if reward.weight < 0}
    for found in record.differences:
        worse = found.difference.low > 0 if found.reward in lower_is_better else found.difference.high < 0
        if found.reward not in trained and worse:
            yield Finding(
                found.reward,
                f"The trained reward rises while {found.reward} gets worse, by {found.difference.show('+.2g')}: the "
                "run may be pleasing its reward at the cost of what that does not see. Look at the pictures; train "
                "less long, or on both.",
            )


def recent(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Mean of a metric over the last iterations, a tenth of them and at least five; None without any."""
    values = [value for _, value in series(rows, key)]
    last = values[-max(FEWEST, math.ceil(RECENT_SHARE * len(values))) :]
    return sum(last) / len(last) if last else None
