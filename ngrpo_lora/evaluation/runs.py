"""The last evaluation of a run against its first, from the scores and measures that the run has left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.judging import write_csv, write_json
from ngrpo_lora.evaluation.statistics import Difference, Scores, compare_scores
from ngrpo_lora.records.metrics import has_same_prompts, labels_of, measures, read_evaluations, read_metrics
from ngrpo_lora.reports.tables import change, markdown_table
from ngrpo_lora.world.meanings import meaning_of

__all__ = ["Pairs", "compare_evaluations", "measures_table", "read_pairs"]


@dataclass(frozen=True)
class Pairs:
    """Scores in a run's first and last evaluation; row i of both is the same prompt, seed and picture to edit.

    first, last: the iterations of the two.
    """

    first: int
    last: int
    prompts: list[str]
    seeds: list[int]
    before: Scores
    after: Scores

    def differences(self, name: str) -> list[Difference]:
        """The last evaluation of the run `name` against the first, one difference a reward."""
        meanings = [*map(meaning_of, self.prompts)]
        return compare_scores(f"{name} @ {self.last}", self.after, f"@ {self.first}", self.before, meanings)


def read_pairs(run: Path) -> Pairs:
    """Read the first and the last evaluation of a run.

    Raises:
        ConfigError: fewer than two evaluations, or none with the same prompts and seeds.
    """
    evaluations = read_evaluations(run)
    if len(evaluations) < 2:
        raise ConfigError(
            f"SOURCE must be a run with a first and a later evaluation, but {str(run)!r} has {len(evaluations)} of them"
        )
    (start, first), *_, (end, last) = evaluations.items()
    pairs = [key for key in first if key in last]
    if not pairs:
        edits = ", of the same picture to edit," if any(edited for *_, edited in (*first, *last)) else ""
        raise ConfigError(
            f"evaluations of {str(run)!r} have no prompt and seed{edits} in common; they cannot be compared"
        )
    labels = [label for label in labels_of(first[pairs[0]]) if label in last[pairs[0]]]
    before, after = (
        {label: [math.nan if side[key][label] is None else side[key][label] for key in pairs] for label in labels}
        for side in (first, last)
    )
    prompts, seeds = [prompt for prompt, *_ in pairs], [seed for _, seed, _ in pairs]
    return Pairs(start, end, prompts, seeds, before, after)


def compare_evaluations(run: Path, output: Path) -> list[Difference]:
    """Compare a run's last evaluation with its first, by the scores that it kept; writes a CSV and a JSON file.

    The JSON file holds the run's measures as well. No model is needed.

    Raises:
        ConfigError: fewer than two evaluations, or none with the same prompts and seeds.
    """
    pairs, name = read_pairs(run), run.resolve().name
    rows = [
        {"run": name, "prompt": prompt, "seed": seed, "reward": label, "before": pairs.before[label][i], "after": x[i]}
        for label, x in pairs.after.items()
        for i, (prompt, seed) in enumerate(zip(pairs.prompts, pairs.seeds, strict=True))
    ]
    differences = pairs.differences(name)
    write_csv(output / f"{name}.csv", rows)
    measured = [{"measure": key, "before": x, "after": y} for key, (x, y) in read_measures(run).items()]
    results = {"run": str(run), "differences": [asdict(d) for d in differences], "measures": measured}
    write_json(output / f"{name}.json", results)
    return differences


def read_measures(run: Path) -> dict[str, tuple[float, float]]:
    """Values of `evaluation.measures` in a run's first and last evaluation, by name."""
    path = run / "metrics.jsonl"
    return measures(read_metrics(path)) if path.is_file() else {}


def measures_table(runs: Sequence[Path]) -> str:
    """The measures of runs as a Markdown table, empty without any; each is one number of all pictures of a run."""
    rows = [
        (run.resolve().name, name, f"{before:.3f}", f"{after:.3f}", change(before, after, alike))
        for run in runs
        for alike in [has_same_prompts(run)]
        for name, (before, after) in read_measures(run).items()
    ]
    return markdown_table(("", "measure", "before", "after", "difference"), rows) if rows else ""
