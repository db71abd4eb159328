"""Measure what it costs that a run can be left alone: checkpoints, records, trackers, report, lock, rewards as guests.

`ngrpo bench overhead` ends with it. A real trainer goes through iterations with a checkpoint after every one, the
metrics file, TensorBoard where it is installed, and the report, in turn with iterations that leave nothing behind.
While one of the former is timed, the checkpoint of the one before is being written beside it.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ngrpo_lora.config import RunConfig, parse_config, parse_reward_entries
from ngrpo_lora.evaluation.report.guard import Guard
from ngrpo_lora.evaluation.report.watching import Reporter
from ngrpo_lora.records.ownership import owned
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.training.evaluation import evaluate
from ngrpo_lora.training.recorder import Recorder
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.state import save
from ngrpo_lora.training.tracking import Tracking
from ngrpo_lora.training.trainer import iterate, tell_of_saves
from ngrpo_lora.training.watcher import Watcher, Watchers
from ngrpo_lora.types import Metrics, Samples

__all__ = ["Keeping", "keeping_table", "measure_keeping", "nothing"]

CHECKPOINT, LOCK, GUESTS = "checkpoint", "lock of the folder", "rewards as guests"
MAX_PROMPTS = 48  # of the evaluation whose report is timed


@dataclass(frozen=True)
class Keeping:
    """Seconds on the training thread.

    bare_s, kept_s: medians of an iteration that leaves nothing behind, and of one with everything on.
    parts_s: what everything is made of, by name, for one iteration.
    """

    bare_s: float
    kept_s: float
    parts_s: dict[str, float]

    @property
    def total_s(self) -> float:
        """Seconds of all parts for one iteration."""
        return sum(self.parts_s.values())


class Clocks:
    """Collects the seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)

    def medians(self) -> dict[str, float]:
        """The median of each part."""
        return {name: statistics.median(seconds) for name, seconds in self.seconds.items()}


def keeping_table(config: RunConfig, iterations: int, tell: Callable[[str], None]) -> None:
    """Measure and tell the parts and their sum as a Markdown table, each as a share of an iteration."""
    found = measure_keeping(config, iterations)
    tell("| left alone: what it costs | for an iteration | share of it |")
    tell("|---|---|---|")
    for name, seconds in {**found.parts_s, "**all of it**": found.total_s}.items():
        tell(f"| {name} | {1000 * seconds:.2f} ms | {seconds / found.bare_s:.2%} |")
    difference = found.kept_s - found.bare_s
    tell(
        f"| an iteration with it {found.kept_s:.3f} s, without {found.bare_s:.3f} s, in turn "
        f"| {1000 * difference:.0f} ms | {difference / found.bare_s:.1%} |"
    )


def measure_keeping(config: RunConfig, iterations: int) -> Keeping:
    """Time `iterations` with everything on, and as many without; nothing of them is kept.

    Raises:
        UserError: the trainer cannot be built or run.
    """
    with tempfile.TemporaryDirectory() as folder:
        kept = everything_on(config, Path(folder) / "run")
        run = prepare(kept)
        recorder = Recorder()
        names: dict[str, Watcher] = {"metrics.jsonl": recorder, "warnings": Guard(), "report.html": Reporter()}
        if kept.tracking:
            names["TensorBoard"] = Tracking(recorder)
        run.watchers = Watchers(names.values())
        alone, each_step, each_evaluation = Clocks(), Clocks(), Clocks()
        with run.watchers.looking_on(run.start()):
            tell_watchers(names, 0, evaluate(run), Clocks())
            iterate(run)  # warms up
            for _ in range(iterations):
                with alone("bare"):
                    iterate(run)
                save(run)  # is written while the next iteration goes on
                with alone("kept"):
                    keep_iteration(run, names, each_step)
                run.saver.wait()
            for _ in range(2):
                tell_watchers(names, run.iteration, evaluate(run), each_evaluation)
        each_run_s = lock_seconds(Path(folder) / "other", iterations) / config.trainer.num_iterations
    parts = each_step.medians()
    for name, seconds in each_evaluation.medians().items():
        parts[name] += seconds / config.evaluation.every
    parts |= {GUESTS: guest_seconds(config, iterations), LOCK: each_run_s}
    return Keeping(alone.medians()["bare"], alone.medians()["kept"], parts)


def everything_on(config: RunConfig, output_dir: Path) -> RunConfig:
    """The configuration with a checkpoint after every iteration, and with TensorBoard where it is installed."""
    data = config.model_dump(mode="json") | {"output_dir": str(output_dir), "resume": None, "hub": {}}
    data["trainer"] |= {"save_every": 1, "keep_best": None}
    data["evaluation"]["num_prompts"] = min(MAX_PROMPTS, config.evaluation.num_prompts)
    data["tracking"] = ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
    return parse_config(data)


def keep_iteration(run: Run, names: dict[str, Watcher], clocks: Clocks) -> None:
    """One iteration and all that the trainer does after it."""
    metrics = iterate(run)
    for name, watcher in names.items():
        with clocks(name):
            watcher.after_update(run.iteration, metrics)
            watcher.after_step(run.iteration, metrics)
    with clocks(CHECKPOINT):
        save(run)
        tell_of_saves(run, last=False)


def tell_watchers(names: dict[str, Watcher], iteration: int, evaluation: Metrics, clocks: Clocks) -> None:
    """What the trainer does after an evaluation."""
    for name, watcher in names.items():
        with clocks(name):
            watcher.after_step(iteration, evaluation)


def lock_seconds(folder: Path, repeats: int) -> float:
    """Median seconds of taking a folder and leaving it."""
    clocks = Clocks()
    for _ in range(repeats):
        with clocks(LOCK), owned(folder):
            pass
    return clocks.medians()[LOCK]


def guest_seconds(config: RunConfig, repeats: int) -> float:
    """Median seconds that scoring the groups of an iteration takes by a reward of the user's that does nothing.

    While groups are drawn, other threads do this: it is what an iteration may wait for at most.
    """
    rollout, model = config.rollout, config.model
    image = Image.new("RGB", (model.width_px, model.height_px))
    group = Samples([image] * rollout.group_size, ["a star"] * rollout.group_size, [{}] * rollout.group_size)
    scorer, clocks = Scorer(parse_reward_entries([f"{__name__}:nothing"])), Clocks()
    scorer(group)  # shows that it leaves all as it was
    for _ in range(repeats):
        with clocks(GUESTS):
            for _ in range(rollout.prompts_per_iteration):
                scorer(group)
    return clocks.medians()[GUESTS]


def nothing(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """A reward that looks at nothing, and gives every picture 0."""
    return [0.0] * len(images)
