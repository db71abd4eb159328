"""Pictures in the order of their rewards: the best of N, a table, and captions for a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.reports.grids import draw_grid
from ngrpo_lora.reports.tables import markdown_table
from ngrpo_lora.scoring.combining import combine
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples

__all__ = ["Ranking", "check_samples", "each_its_own", "rank"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranking:
    """N pictures with their scores by rewards, and their order.

    order: (N,) row numbers, best first; those without a score are last.
    totals: (N,) weighted sums, NaN where a reward failed.
    scores: by reward, (N,), NaN where it failed.
    failures: one line per reason.
    """

    order: list[int]
    totals: list[float]
    scores: dict[str, list[float]]
    failures: list[str]

    @property
    def best(self) -> float:
        """Total of the best picture, the weighted sum of its scores."""
        return self.totals[self.order[0]]

    @property
    def mean(self) -> float:
        """Mean of the totals of all pictures that have one."""
        known = [total for total in self.totals if not math.isnan(total)]
        return sum(known) / len(known)

    def columns(self, row: int) -> dict[str, float]:
        """Every score of one picture by reward, and of several rewards first the total."""
        total = {"total": self.totals[row]} if len(self.scores) > 1 else {}
        return total | {label: raw[row] for label, raw in self.scores.items()}

    def table(self) -> str:
        """A Markdown table, best picture first, numbered from 1; below it what failed, and why."""
        head = ["rank", "image", *self.columns(0)]
        rows = [[rank, row + 1, *map(show, self.columns(row).values())] for rank, row in enumerate(self.order, 1)]
        return "\n".join([markdown_table(head, rows, "---:"), *self.failures])

    def sheet(self, images: Sequence[Image.Image], prompts: Sequence[str], columns: int, cell_px: int) -> Image.Image:
        """Draw all pictures on one sheet, best first, with scores and prompts below them."""
        captions = [
            "\n".join([*(f"{label} {show(score)}" for label, score in self.columns(row).items()), prompts[row]])
            for row in self.order
        ]
        lines = len(self.columns(0)) + 2
        shown = [images[row] for row in self.order]
        return draw_grid(shown, captions, min(columns, len(shown)), lines, cell_px)


def show(score: float) -> str:
    """A score as text, as in `0.750`, or `failed` for NaN."""
    return "failed" if math.isnan(score) else f"{score:.3f}"


def each_its_own(lines: Sequence[T], count: int, what: str) -> list[T]:
    """Give each of `count` images its own line; a single line is repeated for all.

    Raises:
        ConfigError: there is another number of lines.
    """
    if len(lines) not in (1, count):
        raise ConfigError(
            f"{what} must have one line for all images or one line for each of the {count}, got {len(lines)} lines"
        )
    return [*lines] if len(lines) == count else [*lines] * count


def check_samples(scorer: Scorer, samples: Samples) -> None:
    """Check that the rewards can judge these pictures with their prompts.

    Raises:
        ConfigError: a reward needs a prompt and there is none, or it judges groups and prompts differ.
    """
    for label, reward in scorer.rewards.items():
        if {"prompt", "prompts"} & {*reward.parameters} and not all(samples.prompts):
            raise ConfigError(f"reward {label} needs the prompt of every image, got none; write what they should show")
        if reward.form == "group" and samples.group_size < len(samples):
            raise ConfigError(f"reward {label} judges groups of one prompt, got several prompts; score them apart")


def rank(scorer: Scorer, scores: dict[str, Tensor], combined: Literal["standardized", "raw"]) -> Ranking:
    """Rank N images by the scores (N,) that a scorer has just given.

    Args:
        combined: how several rewards are added up, over all N images: see `scoring.combining.combine`.
    Raises:
        UserError: not a single image has all its scores; the message has the reasons.
    """
    configs = [reward.config for reward in scorer.rewards.values()]
    batch = combine({label: raw[None] for label, raw in scores.items()}, configs, combined)
    count = len(next(iter(scores.values())))
    failures = [
        f"reward {label} has no score for {number} of {count} images: {reason}"
        for label, reward in scorer.rewards.items()
        for reason, number in reward.failures.items()
    ]
    for label, raw in scores.items():
        silent = int((~raw.isfinite()).sum()) - sum(scorer.rewards[label].failures.values())
        if silent:
            failures.append(
                f"reward {label} gave {silent} of {count} images a score that is not finite, or not in range"
            )
    if not batch.valid.any():
        raise UserError("\n".join(["no image has a score of every reward:", *failures]))
    totals = batch.rewards[0].where(batch.valid[0], torch.nan)
    order = totals.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True).tolist()
    finite = {label: raw.where(raw.isfinite(), torch.nan).tolist() for label, raw in scores.items()}
    return Ranking(order, totals.tolist(), finite, failures)
