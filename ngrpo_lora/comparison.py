"""Pictures judged, and adapters compared with their base on the same prompts and seeds, with confidence intervals.

Pictures of one prompt are alike, so a prompt counts as one draw: standard errors are cluster-robust over prompts. Where
all pictures are of one prompt, intervals are about this prompt and every picture is a draw. All intervals are of 95%.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track
from scipy import stats

from ngrpo_lora import pages, registry, report, rewards
from ngrpo_lora.adapter_file import adapter_label
from ngrpo_lora.config import RewardConfig, load_config, parse_config
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.pictures import Picture, read_png_text, save_png
from ngrpo_lora.prompts import Prompt, open_prompts
from ngrpo_lora.scoring import Samples, ScoreCache, Scorer, combine
from ngrpo_lora.tracking import console, finite, read_metrics

if TYPE_CHECKING:
    from ngrpo_lora.export import AdapterInfo

__all__ = [
    "Difference",
    "Estimate",
    "Votes",
    "compare_adapters",
    "compare_evaluations",
    "compare_scores",
    "contestants",
    "differences_table",
    "distinct_prompts",
    "mean_interval",
    "parameters",
    "parse_rewards",
    "read_votes",
    "score_pictures",
    "share_interval",
    "votes_table",
]

Scores = dict[str, list[float]]
"""By the reward's label, one per picture, NaN where it failed."""

CONFIDENCE = 0.95
IN_MEMORY = 64  # pictures that are scored at once
ON_SHEET = 120  # pictures of a contact sheet
VOTES_FORMAT = "ngrpo-votes-1"


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; the bounds are NaN where the data cannot give one."""

    value: float
    low: float
    high: float

    def show(self, form: str = ".3f") -> str:
        """`0.750 [0.700, 0.800]`."""
        bounds = "" if math.isnan(self.low) else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{bounds}"


def mean_interval(values: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """The mean and its t interval, with one degree of freedom less than there are groups.

    Args:
        values: (N,); NaN has no say.
        groups: (N,); equal entries say which values are alike.
    """
    kept, numbers = _finite(values, groups)
    if not len(kept):
        return Estimate(math.nan, math.nan, math.nan)
    mean, degrees = float(kept.mean()), int(numbers.max())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees)) * _standard_error(kept, numbers) if degrees else math.nan
    return Estimate(mean, mean - half, mean + half)


def share_interval(wins: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """The mean of wins (1), ties (0.5) and losses (0), and Wilson's interval for it.

    Wilson's n is the effective number of draws, p (1 - p) / se^2 (Kish 1965): at least the number of groups, at most
    the number of draws, which it is when every group has one and there is no tie.

    Args:
        wins: (N,) in [0, 1]; NaN has no say.
        groups: (N,); equal entries say which draws are alike.
    """
    kept, numbers = _finite(wins, groups)
    if not len(kept):
        return Estimate(math.nan, math.nan, math.nan)
    share, count = float(kept.mean()), int(numbers.max()) + 1
    variance, error = share * (1 - share), _standard_error(kept, numbers) if count > 1 else math.inf
    effective = min(max(variance / error**2, count), len(kept)) if error else len(kept) if variance else count
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    center = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * math.sqrt(variance / effective + z**2 / (4 * effective**2))
    return Estimate(share, max(0.0, center - half), min(1.0, center + half))


def _finite(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """The values that are not NaN, and their groups, numbered from 0; of a single group every value is one."""
    kept = [(value, group) for value, group in zip(values, groups, strict=True) if not math.isnan(value)]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(group for _, group in kept))}
    rows = [numbers[group] for _, group in kept] if len(numbers) > 1 else range(len(kept))
    return np.array([value for value, _ in kept]), np.array(rows, dtype=int)


def _standard_error(values: np.ndarray, groups: np.ndarray) -> float:
    """Of the mean: se^2 = G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2 / N^2 (Liang and Zeger 1986).

    With groups of one size it is the standard error of the mean of their means.
    """
    sums = np.bincount(groups, values - values.mean())
    return math.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum()) / len(values)


@dataclass(frozen=True)
class Difference:
    """What a reward says of pictures `label` against the pictures `reference` of the same prompts and seeds."""

    label: str
    reference: str
    reward: str
    before: float
    """Mean of the reference, over the pairs that have both scores."""
    after: float
    difference: Estimate
    win_rate: Estimate
    """Share of the pairs in which `label` scores higher; a tie is half a win."""
    pairs: int
    failed: int


def compare_scores(
    label: str, scores: Scores, reference: str, reference_scores: Scores, groups: Sequence[Hashable]
) -> list[Difference]:
    """One difference per reward that both have; row i of both is the same prompt and seed.

    Args:
        groups: (N,) prompts.
    """
    found = []
    for reward in (name for name in scores if name in reference_scores):
        before, after = np.array(reference_scores[reward]), np.array(scores[reward])
        valid = ~np.isnan(after - before)
        wins = np.where(valid, (after > before) + 0.5 * (after == before), math.nan)
        old, new = (float(column[valid].mean()) if valid.any() else math.nan for column in (before, after))
        difference, win_rate = mean_interval((after - before).tolist(), groups), share_interval(wins.tolist(), groups)
        pairs = int(valid.sum())
        found.append(Difference(label, reference, reward, old, new, difference, win_rate, pairs, len(valid) - pairs))
    return found


def differences_table(differences: Sequence[Difference]) -> str:
    """Markdown."""
    rows = [
        (
            d.label,
            d.reference,
            d.reward,
            f"{d.before:.3f}",
            f"{d.after:.3f}",
            d.difference.show("+.3f"),
            d.win_rate.show(".0%"),
            d.pairs,
            d.failed,
        )
        for d in differences
    ]
    head = ("", "against", "reward", "before", "after", "difference (95% CI)", "win rate (95% CI)", "pairs", "failed")
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def parse_rewards(texts: Sequence[str]) -> tuple[RewardConfig, ...]:
    """Rewards as the command line has them: names, or YAML mappings as in `rewards.train`.

    Raises:
        ConfigError: as `config.load_config`, and a function whose file or module is not there.
    """
    try:
        entries = [reward for text in texts for reward in load_config(None, [f"rewards={text}"]).rewards.train]
        found = parse_config({"rewards": {"train": entries}}).rewards.train
        for reward in found:
            if ":" in reward.name:
                registry.check_function(reward.name)
    except ConfigError as error:
        raise ConfigError(f"--reward {re.sub(r'rewards.train(.[0-9]+)?.?', '', p)}" for p in error.problems) from None
    return found


def check_rewards(configs: Sequence[RewardConfig], pictures: Sequence[Picture]) -> None:
    """Make sure that rewards can judge these pictures one by one; nothing is loaded.

    Raises:
        ConfigError: a reward needs a prompt and a picture has none, or it judges whole groups.
    """
    without = next((picture for picture in pictures if picture.prompt is None), None)
    for config in configs:
        wanted = parameters(config)
        if {"images", "prompt"} <= wanted:
            raise ConfigError(f"--reward {config.key} judges whole groups of candidates, not single pictures")
        if without is not None and wanted & {"prompt", "prompts"}:
            raise ConfigError(
                f"--reward {config.key} needs the prompt of every picture, but {str(without.path)!r} has none; give "
                f"--prompt, or write it to {without.path.stem}.txt or metadata.jsonl beside the picture"
            )


def parameters(config: RewardConfig) -> set[str]:
    """Names of what a reward is called with."""
    if ":" in config.name:
        function = registry.resolve_function(config.name)
    else:
        module = vars(registry.load(rewards, config.name))
        function = module["Reward"].__call__ if "Reward" in module else module["score"]
    return set(inspect.signature(function).parameters)


def judge(scorer: Scorer, pictures: Sequence[Picture], cache: ScoreCache, what: str, group_size: int = 1) -> Scores:
    """Scores of pictures, of which each `group_size` in a row are of one prompt.

    Raises:
        UserError: a reward has no score for any of them, or is none.
    """
    size = max(1, IN_MEMORY // group_size) * group_size
    starts = track(range(0, len(pictures), size), f"scoring {what}", console=console, transient=True)
    scores: Scores = {label: [] for label in scorer.rewards}
    for part in (pictures[start : start + size] for start in starts):
        images, prompts = [picture.load() for picture in part], [picture.prompt or "" for picture in part]
        samples = Samples(images, prompts, [picture.metadata for picture in part], group_size)
        for label, raw in scorer(samples, cache).items():
            scores[label] += raw.tolist()
    for label, raw in scores.items():
        if all(map(math.isnan, raw)):
            raise UserError(f"reward {label} failed for all {len(raw)} {what}; the reasons are above")
    return scores


def score_pictures(
    pictures: Sequence[Picture], configs: Sequence[RewardConfig], output: Path, device: str = "cpu"
) -> str:
    """Score pictures and write `scores.csv`, `scores.json` and `contact_sheet.png`, the best picture first.

    Several rewards are added up as in training: standardised, here over all pictures, and weighted.

    Returns:
        Means and intervals as a Markdown table.
    Raises:
        UserError: as `check_rewards`, and whatever a reward lacks.
    """
    check_rewards(configs, pictures)
    scores = judge(Scorer(configs, device), pictures, ScoreCache(output / "scores.sqlite"), "pictures")
    total = combine({label: torch.tensor([raw]) for label, raw in scores.items()}, configs)
    order = total.rewards[0].where(total.valid[0], -math.inf).argsort(descending=True, stable=True).tolist()
    rows = [
        {"picture": picture.name, "prompt": picture.prompt} | {label: raw[row] for label, raw in scores.items()}
        for row, picture in enumerate(pictures)
    ]
    groups = [row if picture.prompt is None else picture.prompt for row, picture in enumerate(pictures)]
    means = {label: mean_interval(raw, groups) for label, raw in scores.items()}
    failed = {label: sum(map(math.isnan, raw)) for label, raw in scores.items()}
    summary = [{"reward": label} | asdict(means[label]) | {"failed": failed[label]} for label in scores]
    _write_csv(output / "scores.csv", rows)
    _write_json(output / "scores.json", {"rewards": summary, "pictures": rows})
    shown = order if len(order) <= ON_SHEET else order[: ON_SHEET // 2] + order[-ON_SHEET // 2 :]
    captions = [
        "\n".join([*(f"{label} {raw[row]:.3f}" for label, raw in scores.items()), pictures[row].prompt or ""])
        for row in shown
    ]
    images = [pictures[row].load() for row in shown]
    report.save_grid(output / "contact_sheet.png", images, captions, caption_lines=len(scores) + 2)
    cells = [(label, means[label].show(), len(pictures) - failed[label], failed[label]) for label in scores]
    return _table(("reward", "mean (95% CI)", "pictures", "failed"), cells)


def compare_evaluations(run: Path, output: Path) -> list[Difference]:
    """A run's last evaluation against its first, from the scores that it kept; no model is needed.

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
    _write_csv(output / f"{name}.csv", rows)
    _write_json(output / f"{name}.json", {"run": str(run), "differences": [asdict(d) for d in differences]})
    return differences


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A row that has no score leaves its cell empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(finite(list(rows)))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


@dataclass(frozen=True)
class Contestant:
    """Whose pictures they are, and what draws them."""

    label: str
    adapter: Path | None
    info: AdapterInfo

    def settings(self) -> dict[str, Any]:
        """All that a picture depends on beside weights, prompt and seed."""
        rollout = self.info.rollout.model_dump(mode="json", include={"solver", "num_steps", "shift"})
        return self.info.model.model_dump(mode="json") | rollout

    def fingerprint(self) -> str:
        """Equal for equal weights and settings."""
        weights = None if self.adapter is None else hashlib.sha256(self.adapter.read_bytes()).hexdigest()
        return _digest(weights, self.settings())


def compare_adapters(
    entered: Sequence[Contestant],
    prompts: Sequence[Prompt],
    num_seeds: int,
    seed: int,
    configs: Sequence[RewardConfig],
    output: Path,
    device: str = "cpu",
) -> list[Difference]:
    """Draw, judge and write `images/`, `results.csv`, `results.json`, `side_by_side.html` and `blind.html`.

    Args:
        entered: the first is what the others are compared with.
        prompts: (P,), all different.
        num_seeds: K pictures per prompt; picture i of the P * K, prompt-major, has the seed `seed + i`.
    Returns:
        Every other contestant against the first, by every reward.
    """
    scorer = Scorer(configs, device)  # what a reward lacks should be known before a large model is loaded
    seeds = list(range(seed, seed + len(prompts) * num_seeds))
    pictures: dict[str, list[Picture]] = {}
    for one in reversed(entered):  # adapters first: one that does not fit should be known before hours of drawing
        pictures[one.label] = draw(one, prompts, seeds, output / "images" / one.label)
    cache, labels = ScoreCache(output / "scores.sqlite"), [one.label for one in entered]
    scores = {label: judge(scorer, pictures[label], cache, f"pictures of {label}", num_seeds) for label in labels}
    texts = [picture.prompt for picture in pictures[labels[0]]]
    differences = [
        difference
        for label in labels[1:]
        for difference in compare_scores(label, scores[label], labels[0], scores[labels[0]], texts)
    ]
    rows = [
        {
            "prompt": texts[row],
            "seed": seeds[row],
            "files": {label: pictures[label][row].path.relative_to(output).as_posix() for label in labels},
            "scores": {label: {name: raw[row] for name, raw in scores[label].items()} for label in labels},
        }
        for row in range(len(seeds))
    ]
    results = finite(
        {
            "comparison": _digest([one.fingerprint() for one in entered], texts, seeds)[:12],
            "labels": labels,
            "rewards": list(scorer.rewards),
            "adapters": {one.label: None if one.adapter is None else str(one.adapter) for one in entered},
            "settings": entered[0].settings(),
            "differences": [asdict(difference) for difference in differences],
            "pictures": rows,
        }
    )
    _write_json(output / "results.json", results)
    lines = [
        {"label": label, "prompt": row["prompt"], "seed": row["seed"], "file": row["files"][label]}
        | row["scores"][label]
        for label in labels
        for row in rows
    ]
    _write_csv(output / "results.csv", lines)
    pages.write(results, output)
    return differences


def distinct_prompts(source: str, count: int, seed: int) -> list[Prompt]:
    """The first `count` different prompts of a source; fewer where it has no more.

    Raises:
        ConfigError: no such source.
    """
    try:
        prompts = open_prompts(source, seed)
    except ConfigError as error:
        raise ConfigError(f"--prompts {error}") from None
    found: dict[str, Prompt] = {}
    for index in range(20 * count):
        prompt = prompts.prompt(index)
        found.setdefault(prompt.text, prompt)
        if len(found) == count:
            break
    return list(found.values())


def contestants(adapters: Sequence[Path], model: str | None, base: bool, device: str) -> list[Contestant]:
    """The base model, where it is wanted, and the adapters, named by their files or by their runs' folders.

    Raises:
        UserError: not an adapter, nothing to compare with, or adapters that draw in different ways.
    """
    from ngrpo_lora.sampling import drawing_settings  # diffusers is slow to import

    if len(adapters) + base < 2:
        raise ConfigError("ADAPTER must be given twice or more with --no-base, got 1; the others meet the first")
    infos = [drawing_settings(adapter, model, device) for adapter in adapters]
    found = [Contestant("base", None, infos[0])] if base else []
    for adapter, info in zip(adapters, infos, strict=True):
        name, number = adapter_label(adapter), 2
        label = name
        while label in {"base", *(one.label for one in found)}:
            label, number = f"{name}-{number}", number + 1
        found.append(Contestant(label, adapter, info))
    first = found[0].settings()
    for one in found:
        for key, value in one.settings().items():
            if value != first[key]:
                raise ConfigError(
                    f"adapters must draw alike to be compared, but {key} is {value} for {one.label} and {first[key]} "
                    f"for {found[-len(adapters)].label}; compare each with its base in a call of its own"
                )
    return found


def draw(contestant: Contestant, prompts: Sequence[Prompt], seeds: Sequence[int], folder: Path) -> list[Picture]:
    """Pictures in `folder`; one that is there already, from the same weights and settings, stays.

    Args:
        prompts: (P,).
        seeds: (P * K,), prompt-major.
    """
    fingerprint, per_prompt = contestant.fingerprint(), len(seeds) // len(prompts)
    pictures, missing = [], {}
    for row, seed in enumerate(seeds):
        number = row // per_prompt
        picture = Picture(folder / f"{number:03d}-{seed}.png", prompts[number].text, prompts[number].metadata)
        text = {"prompt": prompts[number].text, "seed": str(seed), "ngrpo": fingerprint}
        pictures.append(picture)
        if not text.items() <= read_png_text(picture.path).items():
            missing[picture.path] = text
    if missing:
        from ngrpo_lora.sampling import Sampler  # diffusers is slow to import

        folder.mkdir(parents=True, exist_ok=True)
        texts = [text["prompt"] for text in missing.values()]
        sampler = Sampler(contestant.info, contestant.adapter)
        images = sampler(texts, [int(text["seed"]) for text in missing.values()])
        frames = sampler.family.num_frames  # of a video the middle one is compared
        middle = islice(images, frames // 2, None, frames)
        drawn = track(middle, f"drawing {contestant.label}", len(missing), console=console, transient=True)
        for (path, text), image in zip(missing.items(), drawn, strict=True):
            save_png(path, image, text)
    return pictures


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Votes


@dataclass(frozen=True)
class Votes:
    """What people said of `label` against `reference`, blind."""

    label: str
    reference: str
    wins: int
    ties: int
    losses: int
    win_rate: Estimate


def read_votes(paths: Sequence[Path]) -> list[Votes]:
    """The votes that `blind.html` saved, of one or several people, per adapter.

    Raises:
        ConfigError: not such a file, or files of different comparisons.
    """
    cast: dict[tuple[str, str], list[tuple[float, str]]] = {}
    comparisons = {}
    for path in paths:
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["format"] != VOTES_FORMAT:
                raise ValueError
            comparisons[saved["comparison"]] = path
            for vote in saved["votes"]:
                worth = {"label": 1.0, "tie": 0.5, "reference": 0.0}[vote["choice"]]
                cast.setdefault((vote["label"], vote["reference"]), []).append((worth, vote["prompt"]))
        except OSError as error:
            raise ConfigError(f"--votes must be a file, but {str(path)!r} is not: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"--votes must be a file that blind.html saved, but {str(path)!r} is none") from None
    if len(comparisons) > 1:
        names = " and ".join(map(str, comparisons.values()))
        raise ConfigError(f"--votes must be of one comparison, but {names} are not; give each in a call of its own")
    found = []
    for (label, reference), votes in cast.items():
        worths = [worth for worth, _ in votes]
        wins, ties, losses = (worths.count(worth) for worth in (1.0, 0.5, 0.0))
        win_rate = share_interval(worths, [prompt for _, prompt in votes])
        found.append(Votes(label, reference, wins, ties, losses, win_rate))
    return found


def votes_table(votes: Sequence[Votes]) -> str:
    """Markdown."""
    rows = [(v.label, v.reference, v.win_rate.show(".0%"), v.wins, v.ties, v.losses) for v in votes]
    return _table(("", "against", "preferred (95% CI)", "wins", "ties", "losses"), rows)
