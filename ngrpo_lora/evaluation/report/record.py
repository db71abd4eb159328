"""What a run has left in its folder so far, read for its report."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.config import RewardConfig, RunConfig
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.runs import Pairs, read_pairs
from ngrpo_lora.evaluation.statistics import Difference
from ngrpo_lora.records.files import written_folder
from ngrpo_lora.records.metrics import held_out_series, prompt_sets, read_metrics, series
from ngrpo_lora.records.pictures import read_png_text, save_png
from ngrpo_lora.reports.grids import are_paired
from ngrpo_lora.training.best import ended_early

__all__ = ["Candidate", "Record", "Shown", "names", "save_group"]

GROUP_PX = 512  # kept pictures of a group have at most this size


@dataclass(frozen=True)
class Shown:
    """A held-out prompt's picture by the base, and by the last evaluation where there is a later one that drew it.

    source: what both were edited from, of a model that edits.
    """

    prompt: str
    seed: str
    before: Path
    after: Path | None
    source: Path | None = None


@dataclass(frozen=True)
class Candidate:
    """A picture of the newest group, with its reward."""

    prompt: str
    iteration: int
    reward: float
    path: Path


@dataclass(frozen=True)
class Record:
    """A run's folder, its configuration and its metrics, and whether it is running now."""

    folder: Path
    config: RunConfig
    rows: list[dict[str, Any]]
    is_running: bool

    @classmethod
    def read(cls, folder: Path, config: RunConfig, is_running: bool) -> Record:
        """Read the metrics of a run; the rest is read when it is asked for."""
        return cls(folder, config, read_metrics(folder / "metrics.jsonl"), is_running)

    @property
    def iteration(self) -> int:
        """How many iterations are complete."""
        return self.rows[-1]["step"]

    @property
    def state(self) -> str:
        """Whether the run is running, finished or stopped, and where it stands."""
        total = self.config.trainer.num_iterations
        if self.is_running:
            return f"running, iteration {self.iteration} of {total}"
        if self.iteration >= total:
            return f"finished, {total} iterations"
        how = "finished early" if ended_early(self.config.trainer, self.rows) else "stopped"
        return f"{how} after iteration {self.iteration} of {total}"

    @property
    def seconds(self) -> float:
        """How long all iterations and evaluations took."""
        return sum(value or 0.0 for row in self.rows for key, value in row.items() if key.startswith("time/"))

    @cached_property
    def sets(self) -> dict[int, int]:
        """Which evaluations drew the same prompts and seeds, as `prompt_sets`."""
        return prompt_sets(self.folder)

    def held_out(self, key: str, name: str) -> dict[str, list[tuple[int, float]]]:
        """Points of a metric of evaluations, by the name of their curve: one for each set of prompts."""
        return held_out_series(self.rows, key, self.sets, name)

    @cached_property
    def pairs(self) -> Pairs | None:
        """First and last evaluation; None where there are not two yet."""
        with contextlib.suppress(ConfigError):
            return read_pairs(self.folder)
        return None

    @cached_property
    def differences(self) -> list[Difference]:
        """The last evaluation against the first, one difference a reward; none where there are not two yet."""
        return self.pairs.differences(self.folder.name) if self.pairs else []

    @property
    def trained(self) -> tuple[RewardConfig, ...]:
        """The rewards that the run is trained on."""
        return tuple(self.config.rewards.train)

    @property
    def strict(self) -> str | None:
        """The column of the pass-or-fail reward of the evaluations, if there is one."""
        return self.config.strict_reward and self.config.strict_reward.key

    @property
    def adapter(self) -> Path | None:
        """The exported adapter, once it is there."""
        path = self.folder / "adapter" / FILE_NAME
        return path if path.is_file() else None

    @cached_property
    def shown(self) -> list[Shown]:
        """Held-out prompts with the pictures that evaluations keep in full size."""
        later = len(series(self.rows, "eval/reward_mean")) > 1  # else `last` is of a run before this one
        found = []
        for before in sorted((self.folder / "samples" / "first").glob("*.png"), key=lambda path: int(path.stem)):
            after, text = self.folder / "samples" / "last" / before.name, read_png_text(before)
            paired = later and after.is_file() and are_paired(read_png_text(after), text)
            source = self.folder / "samples" / "sources" / before.name
            same = source.is_file() and are_paired(read_png_text(source), text)
            prompt, seed = text.get("prompt", ""), text.get("seed", "")
            found.append(Shown(prompt, seed, before, after if paired else None, source if same else None))
        return found

    @cached_property
    def group(self) -> list[Candidate]:
        """The newest group that was kept, best first; none where the run has gone back behind it."""
        found = []
        for path in (self.folder / "samples" / "group").glob("*.png"):
            text = read_png_text(path)
            with contextlib.suppress(KeyError, ValueError):  # another's picture
                found.append(Candidate(text["prompt"], int(text["iteration"]), float(text["reward"]), path))
        ranked = sorted(found, key=lambda one: (-one.reward, int(one.path.stem)))
        return [one for one in ranked if one.iteration <= self.iteration]


def save_group(
    folder: Path, iteration: int, prompt: str, images: Sequence[Image.Image], rewards: Sequence[float]
) -> None:
    """Keep a group of candidates in a run's folder, in place of the one before: `samples/group/0.png`, ...

    Each picture holds its prompt, its reward and the iteration as PNG text, and is made smaller than GROUP_PX.
    """
    with written_folder(folder / "samples" / "group") as partial:
        for index, (image, reward) in enumerate(zip(images, rewards, strict=True)):
            small = image.copy()
            small.thumbnail((GROUP_PX, GROUP_PX))
            text = {"prompt": prompt, "reward": repr(float(reward)), "iteration": str(iteration)}
            save_png(partial / f"{index}.png", small, text)


def names(folders: Sequence[Path]) -> list[str]:
    """Names of runs that differ: the last part of each path, or as many as it takes."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-count:]) for part in parts]
        if len(set(found)) == len(set(parts)):
            return found
    return [str(folder) for folder in folders]
