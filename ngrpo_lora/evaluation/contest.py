"""Pictures side by side: a row for each seed, a column for the base and for each adapter, judged or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.judging import parameters
from ngrpo_lora.evaluation.ranking import Ranking, show
from ngrpo_lora.evaluation.sources import needs_source
from ngrpo_lora.evaluation.statistics import Scores, compare_scores, differences_table, mean_interval
from ngrpo_lora.reports.grids import CELL_PX, draw_grid, wrapped
from ngrpo_lora.reports.tables import markdown_table

__all__ = ["Contest", "check_prompt", "check_source"]


@dataclass(frozen=True)
class Contest:
    """Pictures of R seeds by C columns, each column of one model, with or without scores.

    pictures: R * C, row by row. ranking: their scores, in the same order; None: not judged. source: what all of them
    were edited from; None: they are no edits.
    """

    columns: Sequence[str]
    seeds: Sequence[int]
    pictures: Sequence[Image.Image]
    ranking: Ranking | None = None
    source: Image.Image | None = None

    def best(self) -> set[int]:
        """Numbers of the pictures with the highest total of their row as shown, to 0.001; none of a row of equals."""
        if self.ranking is None:
            return set()
        found: set[int] = set()
        for start in range(0, len(self.pictures), len(self.columns)):
            row = range(start, start + len(self.columns))
            shown = {place: round(self.ranking.totals[place], 3) for place in row}
            known = {total for total in shown.values() if not math.isnan(total)}
            if len(known) > 1:
                found |= {place for place, total in shown.items() if total == max(known)}
        return found

    def grid(self, cell_px: int = CELL_PX) -> Image.Image:
        """Draw all pictures as a grid, with their columns' names, seeds and scores; the best of a row has a frame.

        Edits have their source at the beginning of each row.
        """
        best, width = self.best(), len(self.columns)
        pictures: list[Image.Image] = []
        captions: list[str] = []
        framed: set[int] = set()
        for place, picture in enumerate(self.pictures):
            row, column = divmod(place, width)
            if self.source is not None and column == 0:
                pictures.append(self.source)
                captions.append("source")
            if place in best:
                framed.add(len(pictures))
            pictures.append(picture)
            scores = [] if self.ranking is None else self.ranking.columns(place).items()
            lines = [f"{label} {show(score)}" for label, score in scores]
            seed = f"seed {self.seeds[row]}" + (", best" if place in best else "")
            captions.append("\n".join([self.columns[column], seed, *lines]))
        height = max(len(wrapped(caption)) for caption in captions)
        return draw_grid(pictures, captions, width + (self.source is not None), height, cell_px, framed)

    def table(self) -> str:
        """Markdown tables of all scores, of each column's means, and of differences from the first column."""
        judged = self.ranking
        if judged is None:
            return f"not judged; seeds {', '.join(map(str, self.seeds))}; {', '.join(self.columns)}"
        best, width = self.best(), len(self.columns)
        rows = [
            [str(self.seeds[place // width]), self.columns[place % width], *map(show, judged.columns(place).values())]
            + ["best" if place in best else ""]
            for place in range(len(self.pictures))
        ]
        scores = {column: self.scores(number) for number, column in enumerate(self.columns)}
        if len(self.seeds) > 1:
            for column, own in scores.items():
                means = [mean_interval(raw, [column] * len(raw)).show() for raw in own.values()]
                rows.append(["mean (95% CI)", column, *means, ""])
        text = markdown_table(["seed", "drawn with", *judged.columns(0), ""], rows)
        reference, *others = scores
        differences = [
            one
            for other in others
            for one in compare_scores(other, scores[other], reference, scores[reference], [reference] * len(self.seeds))
        ]
        paired = [differences_table(differences)] if differences and len(self.seeds) > 1 else []
        return "\n\n".join([text, *paired, *judged.failures])

    def scores(self, column: int) -> Scores:
        """Scores of the pictures of one column, by reward."""
        assert self.ranking is not None
        columns = [self.ranking.columns(place) for place in range(column, len(self.pictures), len(self.columns))]
        return {label: [one[label] for one in columns] for label in columns[0]}


def check_prompt(rewards: Sequence[RewardConfig], prompt: str) -> None:
    """Check, before anything is drawn or loaded, that there is a prompt where a reward needs one.

    Raises:
        ConfigError: a reward needs the prompt, and it is empty.
    """
    for reward in rewards:
        if not prompt.strip() and parameters(reward) & {"prompt", "prompts"}:
            raise ConfigError(f"reward {reward.key} needs the prompt, got none; write what the pictures should show")


def check_source(rewards: Sequence[RewardConfig], given: bool) -> None:
    """Check, before anything is drawn or loaded, that there is a source where a reward judges edits.

    Raises:
        ConfigError: a reward needs the source, and there is none.
    """
    for reward in rewards:
        if not given and needs_source(reward):
            raise ConfigError(
                f"reward {reward.key} needs the source picture, got none; connect what the pictures are edited from"
            )
