"""What an iteration costs against the quantities that it is made of: `ngrpo bench scaling`.

One quantity at a time takes three or four values, all others as configured: candidates a group G, solver steps T,
trained transitions (B * K of every group of Neighbor GRPO), pixels, and, if asked for, processes. Iterations of the
trainer at all of these take turns after one each that warms up, so that a machine that drifts slows all alike; the
median of each stage counts. Through the medians go a line, seconds = a + b * x, and a power law, whose exponent is the
slope of log seconds against log x, with its standard error. With a fixed cost a > 0 the exponent stays below that of
what grows.

So that nothing but the quantity differs, every iteration trains the same number of transitions: pictures are scored,
but advantages are those of made-up rewards, which differ in each group, and what is beyond the number is left out. All
values share one model and one adapter.

Processes are whole `ngrpo train` runs, one after another, with their own rewards and all their transitions.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from ngrpo_lora.adapters.header import code_version
from ngrpo_lora.bench.held import HeldAlgorithm
from ngrpo_lora.bench.rows import Countdown, machine
from ngrpo_lora.config import RunConfig, dump_config, parse_config
from ngrpo_lora.console import console
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation.judging import write_json
from ngrpo_lora.planning.misfits import check_prompts
from ngrpo_lora.planning.preflight import check_settings
from ngrpo_lora.records.files import written
from ngrpo_lora.records.metrics import read_metrics
from ngrpo_lora.reports.tables import markdown_table
from ngrpo_lora.training.metering import STAGES
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import open_algorithm, prepare
from ngrpo_lora.training.trainer import iterate
from ngrpo_lora.types import Metrics, RewardBatch

__all__ = ["Case", "Fit", "Sweep", "fit", "measure", "plan", "scaling_table"]

# The first of these counts whose values the configuration allows; some algorithms take powers of two alone.
FACTORS = ((0.5, 1.0, 1.5, 2.0), (1.0, 1.5, 2.0, 3.0), (0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0), (1.0, 2.0, 4.0))
SHARES = (0.25, 0.5, 0.75, 1.0)  # of an iteration's transitions

EXPECTED = {
    "group size": {"rollout": 1, "update": 0},
    "solver steps": {"rollout": 1, "update": 0},
    "transitions": {"rollout": 0, "update": 1},
    "pixels": {},  # from 1, where layers for single tokens weigh most, to 2 where attention does
    "processes": {"rollout": -1, "update": -1},
}
"""The exponents that the method leads to where forward and backward passes are all that costs."""


@dataclass(frozen=True)
class Fit:
    """A line `seconds = intercept_s + slope_s * x` and a power law through the same points."""

    intercept_s: float
    slope_s: float
    exponent: float
    error: float
    """Standard error of the exponent; NaN of two points."""


def fit(x: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Fit both by least squares, the power law in logarithms; it is NaN where a time is 0.

    Args:
        x, seconds: (N,) with N >= 2 different x, all positive.
    """
    line: Any = stats.linregress(x, seconds)
    if min(seconds) <= 0:
        return Fit(line.intercept, line.slope, math.nan, math.nan)
    power: Any = stats.linregress([math.log(value) for value in x], [math.log(value) for value in seconds])
    return Fit(line.intercept, line.slope, power.slope, power.stderr if len(x) > 2 else math.nan)


@dataclass(frozen=True)
class Case:
    """One value of a quantity: the configuration that has it, and how many transitions an iteration trains."""

    x: int
    config: RunConfig
    transitions: int


@dataclass(frozen=True)
class Sweep:
    """The values of one quantity, and each one's median seconds by stage."""

    quantity: str
    x: list[int]
    seconds: dict[str, list[float]]

    def fits(self) -> dict[str, Fit]:
        """The fits of every stage and of the whole iteration."""
        return {stage: fit(self.x, seconds) for stage, seconds in self.seconds.items()}


def available(config: RunConfig) -> int:
    """How many transitions an iteration trains where every group has advantages; no model is needed."""
    shape = (config.rollout.prompts_per_iteration, config.rollout.group_size)
    held = HeldAlgorithm(open_algorithm(config))
    blank = RewardBatch(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.bool), {})
    return sum(map(len, held.updates(held.advantages(blank), seed=0, iteration=0)))


def changed(config: RunConfig, section: str, **values: int) -> RunConfig:
    """The checked configuration with other values of a section.

    Raises:
        ConfigError: the values do not go with the rest.
    """
    data = config.model_dump(mode="json")
    data[section] |= values
    return parse_config(data)


def values_of(base: int, multiple: int, change: Callable[[int], RunConfig]) -> dict[int, RunConfig]:
    """Multiples of a base value, the first of `FACTORS` that the configuration allows, with a configuration each.

    Raises:
        ConfigError: it allows none.
    """
    problems: list[str] = []
    for factors in FACTORS:
        values = [max(1, round(base * factor / multiple)) * multiple for factor in factors]
        try:
            if len({*values}) == len(values):
                return {value: change(value) for value in values}
        except ConfigError as error:
            problems += error.problems
    raise ConfigError(
        f"`ngrpo bench scaling` finds no values to vary: {problem}" for problem in dict.fromkeys(problems)
    )


def plan(config: RunConfig) -> dict[str, list[Case]]:
    """Choose the cases of every quantity, all of one quantity with the same number of transitions but for its own.

    Raises:
        ConfigError: the configuration leaves no room for values of a quantity.
    """
    rollout, model = config.rollout, config.model
    multiple = 16 if model.width_px % 32 or model.width_px < 64 else 32  # of which any model takes multiples

    def resized(width_px: int) -> RunConfig:
        height_px = max(1, round(model.height_px * width_px / model.width_px / multiple)) * multiple
        return changed(config, "model", width_px=width_px, height_px=height_px)

    sizes = values_of(model.width_px, multiple, resized).values()
    configs = {
        "group size": values_of(rollout.group_size, 1, lambda value: changed(config, "rollout", group_size=value)),
        "solver steps": values_of(rollout.num_steps, 1, lambda value: changed(config, "rollout", num_steps=value)),
        "pixels": {other.model.width_px * other.model.height_px: other for other in sizes},
    }
    cases = {}
    for quantity, found in configs.items():
        held = min(map(available, found.values()))
        cases[quantity] = [Case(x, other, held) for x, other in found.items()]
    most = available(config)
    trained = sorted({max(1, round(share * most)) for share in SHARES})
    if len(trained) < 3:
        raise ConfigError(
            f"an iteration must have at least 3 transitions, or no fewer can be trained, got {most}; raise "
            "rollout.prompts_per_iteration"
        )
    cases["transitions"] = [Case(count, config, count) for count in trained]
    return cases


def variant(run: Run, case: Case) -> Run:
    """A run at a case's settings, which shares the model and the adapter of `run`.

    Raises:
        UserError: the model does not draw this size.
    """
    config = case.config
    family = run.family.with_settings(config.model)
    schedule = family.schedule(config.rollout.num_steps, config.rollout.shift)
    algorithm = open_algorithm(config, family.trained_steps(schedule.sigmas))
    return replace(
        run,
        config=config,
        family=family,
        algorithm=HeldAlgorithm(algorithm, case.transitions),
        schedule=schedule,
    )


def measure(
    config: RunConfig, cases: Mapping[str, list[Case]], repeats: int, done: Callable[[], None] = lambda: None
) -> list[Sweep]:
    """Time `repeats` iterations of every case in turns, after one each that warms up; nothing of them is kept.

    Raises:
        UserError: the run cannot be prepared, or the model does not draw a size.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(on_the_side(config, folder, 1 + repeats))
        runs = [variant(run, case) for case in flat(cases)]
        turns = []
        for _ in range(1 + repeats):
            turn = []
            for one in runs:
                turn.append(iterate(one))
                done()
            turns.append(turn)
    timed = iter([stage_medians([turn[place] for turn in turns[1:]]) for place in range(len(runs))])
    return [sweep(quantity, {case.x: next(timed) for case in found}) for quantity, found in cases.items()]


def flat(cases: Mapping[str, list[Case]]) -> Iterator[Case]:
    """The cases of all quantities in one list."""
    return (case for found in cases.values() for case in found)


def on_the_side(config: RunConfig, folder: str, iterations: int) -> RunConfig:
    """The configuration of a run in a folder of its own, so long and with one held-out picture."""
    evaluation = config.evaluation.model_copy(update={"num_prompts": 1, "every": iterations})
    trainer = config.trainer.model_copy(update={"num_iterations": iterations, "save_every": iterations})
    update = {"output_dir": folder, "evaluation": evaluation, "trainer": trainer, "resume": None}
    return config.model_copy(update=update)


def stage_medians(rows: Sequence[Metrics]) -> dict[str, float]:
    """Median seconds of every stage and of their sum, over iterations."""
    seconds = {stage: [row[f"time/{stage}_s"] for row in rows] for stage in STAGES}
    seconds["iteration"] = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
    return {stage: statistics.median(values) for stage, values in seconds.items()}


def sweep(quantity: str, timed: Mapping[int, dict[str, float]]) -> Sweep:
    """Put the medians of all values of a quantity together."""
    stages = next(iter(timed.values()))
    return Sweep(quantity, [*timed], {stage: [seconds[stage] for seconds in timed.values()] for stage in stages})


def measure_processes(config: RunConfig, counts: Sequence[int], repeats: int, done: Callable[[], None]) -> Sweep:
    """Time `ngrpo train` on so many processes: the median of `repeats` iterations after one that warms up.

    Raises:
        UserError: a run failed; its own message is in this one.
    """
    timed = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            output, path = Path(folder) / "run", Path(folder) / "config.yaml"
            path.write_text(dump_config(on_the_side(config, str(output), 1 + repeats)), encoding="utf-8")
            words = ["train", str(path), "--num-processes", str(count)]
            result = subprocess.run([sys.executable, "-m", "ngrpo_lora", *words], capture_output=True, text=True)
            if result.returncode:
                said = [line for line in result.stderr.splitlines() if line.strip()] or [f"status {result.returncode}"]
                raise UserError(f"a run of {count} processes failed: {said[-1]}")
            rows = [row for row in read_metrics(output / "metrics.jsonl") if "time/update_s" in row]
        timed[count] = stage_medians(rows[1:])
        done()
    return sweep("processes", timed)


def check_processes(config: RunConfig, counts: Sequence[int]) -> None:
    """Refuse numbers of processes that no run can have.

    Raises:
        ConfigError: one number alone, or more processes than groups.
    """
    groups = config.rollout.prompts_per_iteration
    if counts and (len({*counts}) < 2 or not all(1 <= count <= groups for count in counts)):
        raise ConfigError(
            f"--processes must be two or more different numbers from 1 to rollout.prompts_per_iteration ({groups}), "
            f"got {','.join(map(str, counts))}; for example 1,2"
        )


def scaling_table(
    config: RunConfig, processes: Sequence[int], repeats: int, output: Path | None, tell: Callable[[str], None]
) -> None:
    """Measure every quantity and tell times and fits as a Markdown table; `output` has them as JSON.

    Raises:
        UserError: the configuration leaves no room for three values of each, or a run fails, or Ctrl-C; what was
            measured before it is told, and in `output`.
    """
    check_processes(config, processes)
    check_settings(config)
    check_prompts(config)
    cases = plan(config)
    if output is not None:
        check_writable(output)
    total = len([*flat(cases)]) * (1 + repeats) + len(processes) * (1 + repeats)
    countdown = Countdown(total, console.print)
    sweeps: list[Sweep] = []
    try:
        sweeps += measure(config, cases, repeats, partial(countdown.done, 1, "scaling"))
        if processes:
            done = partial(countdown.done, 1 + repeats, "processes")
            sweeps.append(measure_processes(config, processes, repeats, done))
    except KeyboardInterrupt:
        kept = "whole runs are not timed" if sweeps else "as all values take turns, there is nothing to keep"
        raise UserError(f"stopped; {kept}; --repeats 1 is the shortest") from None
    finally:
        if sweeps:
            report(config, sweeps, repeats, output, tell)


def report(
    config: RunConfig, sweeps: Sequence[Sweep], repeats: int, output: Path | None, tell: Callable[[str], None]
) -> None:
    """Write times and fits as JSON, where an output is given, and tell them as a Markdown table."""
    if output is not None:
        found = [{**asdict(one), "fits": {k: asdict(f) for k, f in one.fits().items()}} for one in sweeps]
        head = {"bench": "scaling", "version": code_version(), "machine": machine(), "repeats": repeats}
        with written(output) as unfinished:
            write_json(unfinished, {**head, "config": config.model_dump(mode="json"), "sweeps": found})
    tell(f"Medians of {repeats} iterations, {machine()}\n")
    tell("Fits: seconds = a + b x, and the exponent of a power law with its standard error. Expected: where passes")
    tell("through the model are all that costs. The reward is what is left to wait for after the rollout.\n")
    tell(as_table(sweeps))


def check_writable(output: Path) -> None:
    """Make sure that the file can be written before much time is spent on it, and is none of another purpose.

    Raises:
        ConfigError: it cannot, or it is.
    """
    if output.is_file():
        try:
            known = json.loads(output.read_text(encoding="utf-8"))["bench"] == "scaling"
        except (OSError, ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise ConfigError(
                f"--output must be a new file or one of `ngrpo bench scaling`, but {str(output)!r} is neither; give "
                "another name"
            )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        is_new = not output.exists()
        output.open("a").close()
        if is_new:
            output.unlink()
    except OSError as error:
        raise ConfigError(f"--output must be a writable file, got {str(output)!r}: {error.strerror}") from None


def as_table(sweeps: Sequence[Sweep]) -> str:
    """Times and fits, one line for each quantity and stage."""
    lines = []
    for one in sweeps:
        for stage, found in one.fits().items():
            times = ", ".join(f"{x}: {seconds:.3f}" for x, seconds in zip(one.x, one.seconds[stage], strict=True))
            exponent = "" if math.isnan(found.exponent) else f"{found.exponent:.2f}"
            error = "" if math.isnan(found.error) else f" ± {found.error:.2f}"
            line = f"{found.intercept_s:.3f} {found.slope_s:+.3g} x"
            lines.append((one.quantity, stage, times, line, exponent + error, EXPECTED[one.quantity].get(stage, "")))
    return markdown_table(("x", "stage", "seconds at x", "a + b x", "exponent", "expected"), lines)
