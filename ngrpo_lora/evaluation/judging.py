"""Pictures scored by rewards, best first on a contact sheet."""

from __future__ import annotations

import csv
import inspect
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig, load_config, parse_config
from ngrpo_lora.console import console
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation.sources import with_sources
from ngrpo_lora.evaluation.statistics import Scores, mean_interval
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.pictures import take_pictures
from ngrpo_lora.records.metrics import finite
from ngrpo_lora.records.pictures import Picture
from ngrpo_lora.reports import grids
from ngrpo_lora.reports.tables import markdown_table
from ngrpo_lora.scoring.cache import ScoreCache
from ngrpo_lora.scoring.combining import combine
from ngrpo_lora.scoring.scorer import Scorer, load_reward
from ngrpo_lora.types import Samples
from ngrpo_lora.world.meanings import meaning_of

__all__ = ["parameters", "parse_rewards", "score_pictures"]


IN_MEMORY = 64  # pictures that are scored at once
ON_SHEET = 120  # pictures of a contact sheet


def parse_rewards(texts: Sequence[str]) -> tuple[RewardConfig, ...]:
    """Read rewards from the command line: names, or YAML mappings as in `rewards.train`.

    Raises:
        ConfigError: as `config.load_config`, or the file or module of a function is not there.
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
    """Names of the parameters that a reward is called with."""
    if ":" in config.name:
        function = load_reward(config)
    else:
        module = vars(registry.load(registry.REWARDS, config.name))
        function = module["Reward"].__call__ if "Reward" in module else module["score"]
    return set(inspect.signature(function).parameters)


def judge(scorer: Scorer, pictures: Sequence[Picture], cache: ScoreCache, what: str, group_size: int = 1) -> Scores:
    """Score pictures by every reward; each `group_size` in a row are of one prompt.

    Raises:
        UserError: a reward has no score for any picture, or returns other than a score for each.
    """
    size = max(1, IN_MEMORY // group_size) * group_size
    starts = track(range(0, len(pictures), size), f"scoring {what}", console=console, transient=True)
    scores: Scores = {label: [] for label in scorer.rewards}
    for part in (pictures[start : start + size] for start in starts):
        images, prompts = [picture.load() for picture in part], [picture.prompt or "" for picture in part]
        metadata = [shown(picture, image.size) for picture, image in zip(part, images, strict=True)]
        of_videos = any(reward.form == "video" for reward in scorer.rewards.values())
        videos = [picture.frames() for picture in part] if of_videos else ()
        samples = Samples(images, prompts, metadata, group_size, videos)
        for label, raw in scorer(samples, cache).items():
            scores[label] += raw.tolist()
    for label, raw in scores.items():
        if all(map(math.isnan, raw)):
            raise UserError(f"reward {label} failed for all {len(raw)} {what}; the reasons are above")
    return scores


def shown(picture: Picture, size: tuple[int, int]) -> dict[str, Any]:
    """A picture's metadata as rewards get it: with the source and mask that it names, where their files are there.

    Others are text, such as where a caption is from; `with_sources` refuses them where a reward judges edits.

    Raises:
        ConfigError: one of them is no picture that can be used.
    """
    metadata = dict(picture.metadata)
    named = take_pictures(metadata, picture.path.parent, picture.place)
    pictures = {name: one for name, one in named.items() if isinstance(one.content, Path) and one.content.is_file()}
    return Prompt(picture.prompt or "", metadata, **pictures, place=picture.place).shown(size)


def score_pictures(
    pictures: Sequence[Picture], configs: Sequence[RewardConfig], output: Path, device: str = "cpu"
) -> str:
    """Score pictures and write `scores.csv`, `scores.json` and `contact_sheet.png`, the best picture first.

    Several rewards are added up as in training: standardised, here over all pictures, and weighted. Pictures that
    others are edits of are left out.

    Returns:
        Means and intervals as a Markdown table.
    Raises:
        UserError: as `check_rewards` and `with_sources`, and whatever a reward lacks.
    """
    pictures = with_sources(pictures, configs)
    check_rewards(configs, pictures)
    scores = judge(Scorer(configs, device), pictures, ScoreCache(output / "scores.sqlite"), "pictures")
    total = combine({label: torch.tensor([raw]) for label, raw in scores.items()}, configs)
    order = total.rewards[0].where(total.valid[0], -math.inf).argsort(descending=True, stable=True).tolist()
    rows = [
        {"picture": picture.name, "prompt": picture.prompt} | {label: raw[row] for label, raw in scores.items()}
        for row, picture in enumerate(pictures)
    ]
    groups = [row if picture.prompt is None else meaning_of(picture.prompt) for row, picture in enumerate(pictures)]
    means = {label: mean_interval(raw, groups) for label, raw in scores.items()}
    failed = {label: sum(map(math.isnan, raw)) for label, raw in scores.items()}
    summary = [{"reward": label} | asdict(means[label]) | {"failed": failed[label]} for label in scores]
    write_csv(output / "scores.csv", rows)
    write_json(output / "scores.json", {"rewards": summary, "pictures": rows})
    shown = order if len(order) <= ON_SHEET else order[: ON_SHEET // 2] + order[-ON_SHEET // 2 :]
    captions = [
        "\n".join([*(f"{label} {raw[row]:.3f}" for label, raw in scores.items()), pictures[row].prompt or ""])
        for row in shown
    ]
    images = [pictures[row].load() for row in shown]
    grids.save_grid(output / "contact_sheet.png", images, captions, caption_lines=len(scores) + 2)
    cells = [(label, means[label].show(), len(pictures) - failed[label], failed[label]) for label in scores]
    return markdown_table(("reward", "mean (95% CI)", "pictures", "failed"), cells)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as a CSV file; a score that is not finite leaves its cell empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(finite(list(rows)))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
