"""The last evaluation of a run against its first, from the scores that the run has left."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.judging import write_csv, write_json
from ngrpo_lora.evaluation.statistics import Difference, compare_scores
from ngrpo_lora.records.metrics import read_metrics

__all__ = ["compare_evaluations"]


def compare_evaluations(run: Path, output: Path) -> list[Difference]:
    """Compare a run's last evaluation with its first, by the scores that it kept; writes a CSV and a JSON file.

    No model is needed.

    Raises:
        ConfigError: fewer than two evaluations, or none with the same prompts and seeds.
    """
    files = sorted((run / "evaluations").glob("*.jsonl"))
    if len(files) < 2:
        raise ConfigError(
            f"SOURCE must be a run with a first and a later evaluation, but {str(run)!r} has {len(files)} of them"
        )
    first, last = ({(row["prompt"], row["seed"]): row for row in read_metrics(file)} for file in (files[0], files[-1]))
    pairs = [key for key in first if key in last]
    if not pairs:
        raise ConfigError(f"evaluations of {str(run)!r} have no prompt and seed in common; they cannot be compared")
    labels = [label for label in first[pairs[0]] if label in last[pairs[0]] and label not in ("prompt", "seed")]
    before, after = (
        {label: [math.nan if side[key][label] is None else side[key][label] for key in pairs] for label in labels}
        for side in (first, last)
    )
    prompts, name = [prompt for prompt, _ in pairs], run.resolve().name
    rows = [
        {"run": name, "prompt": prompt, "seed": seed, "reward": label, "before": before[label][i], "after": x[i]}
        for label, x in after.items()
        for i, (prompt, seed) in enumerate(pairs)
    ]
    differences = compare_scores(f"{name} @ {int(files[-1].stem)}", after, f"@ {int(files[0].stem)}", before, prompts)
    write_csv(output / f"{name}.csv", rows)
    write_json(output / f"{name}.json", {"run": str(run), "differences": [asdict(d) for d in differences]})
    return differences
