"""What the direction of one iteration's update is worth, before anybody starts long runs: `ngrpo bench gradient`.

From one fixed adapter, N iterations of the trainer (other prompts, other noises) give N gradients of the first update,
and nothing moves. A new adapter has lora_B = 0: only lora_B has a gradient then, that of lora_A is 0.

1. The common share, the mean of <g_i, g_j> over pairs i != j divided by the mean of |g_i|^2. With g_i = m + e_i and
   independent noises e_i of mean 0 it is |m|^2 / (|m|^2 + E|e|^2): 1 if every iteration says the same, 0 if they have
   nothing in common, and less than 0 by chance. Numerator and denominator are unbiased. Its interval is a jackknife
   over the gradients (a bootstrap would draw some twice, whose product is no product of independent ones).
2. The improvement: held-out reward after a step against the mean gradient, less that without, picture by picture of
   the same prompts and seeds. The unit of steps is the length of AdamW's first step, learning_rate * sqrt(n) for n
   elements that have a gradient, as it moves each by the learning rate. The best step is chosen on one half of the
   prompts and its improvement is that of the other half, so that choosing does not flatter. Its interval is over
   prompts, for the direction that was found.

Gradients are of training prompts, improvements of held-out ones. It runs as one process.
"""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ngrpo_lora.bench.rows import Countdown, Row, Rows, machine
from ngrpo_lora.bench.varying import Setting
from ngrpo_lora.config import RunConfig
from ngrpo_lora.console import console
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.evaluation.statistics import CONFIDENCE, Estimate, mean_interval
from ngrpo_lora.planning.misfits import check_prompts
from ngrpo_lora.planning.preflight import check_settings
from ngrpo_lora.prompts.sources import open_run
from ngrpo_lora.reports.tables import markdown_table
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.training.evaluation import draw_held_out, score_held_out
from ngrpo_lora.training.lora_step import MAX_SKIPPED_IN_A_ROW, LoraStep
from ngrpo_lora.training.rewarding import too_many_failed
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import iterate
from ngrpo_lora.world.meanings import meaning_of

__all__ = ["Asked", "GradientStep", "Point", "chosen", "common_share", "gradient_table", "halves", "measure"]

MIN_HELD_OUT = 4  # different prompts: two in each half, or there is no interval


@dataclass(frozen=True)
class Asked:
    """How much is measured: gradients, held-out prompts, and the lengths of the line search in AdamW steps."""

    gradients: int = 12
    prompts: int = 64
    steps: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)

    def check(self) -> None:
        """Refuse a configuration, or numbers of gradients and prompts, that cannot give the figures.

        Raises:
            ConfigError: fewer than two gradients, too few prompts, or steps that are not positive.
        """
        if self.gradients < 2:
            raise ConfigError(f"--gradients must be at least 2, as pairs of them are compared, got {self.gradients}")
        if self.prompts < MIN_HELD_OUT:
            raise ConfigError(f"--prompts must be at least {MIN_HELD_OUT}, two for each half, got {self.prompts}")
        for step in self.steps:
            if not 0 < step < math.inf:
                raise ConfigError(
                    f"--step must be a positive number of AdamW steps, got {step:g}; 0.1, 0.3, 1 are some"
                )


class GradientStep(LoraStep):
    """A step of the adapter that keeps the gradients of an iteration's updates and moves nothing."""

    def __init__(self, run: Run):
        """Take the place of a run's step, with its weights."""
        weights, family = run.lora_step.parameters, run.family
        super().__init__(run.config.optimizer, weights, run.processes, family.dtype, family.device)
        self.gradients: list[Tensor | None] = []

    def set_rate(self, iteration: int, num_iterations: int) -> float:
        """Begin an iteration: forget the gradients of the one before."""
        self.gradients = []
        return super().set_rate(iteration, num_iterations)

    def take(self, finite: bool, empty: bool) -> float:
        """Keep the gradient, (elements,) float32 on the CPU, 0 of an empty update; None where it is not finite."""
        if not empty:
            self.scaler.unscale_(self.optimizer)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()]
        gradient = torch.cat([gradient.flatten().cpu() for gradient in gradients])
        if not empty:
            self.scaler.update()
        self.optimizer.zero_grad()
        finite = finite and bool(gradient.isfinite().all())
        self.gradients.append(gradient if finite else None)
        return gradient.norm().item() if finite else math.nan


def collect_gradients(run: Run, count: int, done: Callable[[], None]) -> tuple[Tensor, list[float], list[float]]:
    """Gradients (N, elements) of the first updates of N iterations, with each iteration's seconds: CPU's, then wall's.

    An iteration whose gradient is not finite is passed over, as float16's first ones often are.

    Raises:
        UserError: too many are not finite, or all are 0.
    """
    run.lora_step = step = GradientStep(run)
    gradients, cpu_s, wall_s = [], [], []
    for _ in range(count + MAX_SKIPPED_IN_A_ROW):
        start = time.process_time(), time.perf_counter()
        iterate(run)
        if step.gradients[0] is not None:
            gradients.append(step.gradients[0])
            cpu_s.append(time.process_time() - start[0])
            wall_s.append(time.perf_counter() - start[1])
            done()
        if len(gradients) == count:
            break
    else:
        raise UserError(
            f"only {len(gradients)} of {run.iteration} iterations had a finite gradient; model.dtype=float32 gives more"
        )
    if not any(gradient.any() for gradient in gradients):
        raise UserError(
            f"none of {count} iterations had a gradient, as no group's rewards differ; larger groups, another reward "
            "or a larger spread of the noises may give some"
        )
    return torch.stack(gradients), cpu_s, wall_s


def products(gradients: Tensor) -> np.ndarray:
    """All inner products (N, N) of gradients (N, elements), added up in float64."""
    pieces = gradients.split(1 << 20, 1)
    return sum((piece.double() @ piece.double().T for piece in pieces), torch.zeros(())).numpy()


def common_share(gram: np.ndarray) -> Estimate:
    """The share of the gradients' squared norm that independent iterations have in common, with a jackknife interval.

    Args:
        gram: (N, N) inner products; with fewer than 3 gradients there is no interval.
    """
    count = len(gram)

    def share(kept: Sequence[int]) -> float:
        part = gram[np.ix_(kept, kept)]
        squares = float(np.trace(part))
        return float(part.sum() - squares) / (len(kept) - 1) / squares if squares else math.nan

    value = share(range(count))
    if count < 3:
        return Estimate(value, math.nan, math.nan)
    left_out = np.array([share([j for j in range(count) if j != i]) for i in range(count)])
    error = math.sqrt((count - 1) / count * np.square(left_out - left_out.mean()).sum())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Estimate(value, value - half, value + half)


@dataclass(frozen=True)
class Point:
    """A point of the line search: its step, and the mean gain in reward on either half of the held-out prompts."""

    step: float
    choosing: float
    gain: Estimate
    """On the half that does not choose; the interval is over its prompts."""


def halves(prompts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Places of the prompts that choose a step and of those that report it; prompts of one meaning are on one side."""
    meanings = [*map(meaning_of, prompts)]
    ordered = sorted(set(meanings), key=lambda meaning: derive_seed("half", meaning))
    choosing = set(ordered[: len(ordered) // 2])
    places: tuple[list[int], list[int]] = ([], [])
    for place, meaning in enumerate(meanings):
        places[meaning not in choosing].append(place)
    return places


def point(step: float, before: Tensor, after: Tensor, prompts: Sequence[str]) -> Point:
    """Compare held-out rewards (M,) after a step with those before it, NaN where a reward failed."""
    choosing, reporting = halves(prompts)
    gains = after - before
    gain = mean_interval(gains[reporting].tolist(), [meaning_of(prompts[place]) for place in reporting])
    return Point(step, gains[choosing].nanmean().item(), gain)


def chosen(points: Sequence[Point]) -> Point:
    """The point with the highest reward on the choosing half alone."""
    return max(points, key=lambda point: point.choosing)


def held_out_rewards(run: Run, weights: dict[str, Tensor]) -> Tensor:
    """Rewards (M,) of the held-out prompts' pictures with these LoRA weights: weighted sums of the raw scores.

    Raises:
        UserError: more scores failed than `rewards.max_failed_share` allows.
    """
    run.lora_step.averaged = weights  # what evaluations draw with
    everything = range(len(run.held_out))
    scores = score_held_out(run, everything, draw_held_out(run, everything))
    if failed := too_many_failed(run, scores):
        raise UserError(f"held-out pictures: {failed}")
    trained = run.config.rewards.train
    return torch.stack([reward.weight * scores[reward.key].double() for reward in trained]).sum(0)


def line_search(run: Run, direction: Tensor, steps: Sequence[float], done: Callable[[], None]) -> list[Point]:
    """Measure each step against a direction (elements,) from the run's live weights."""
    weights = {name: parameter.detach().clone() for name, parameter in run.lora_step.parameters.items()}
    unit = run.config.optimizer.learning_rate * math.sqrt(int(direction.count_nonzero()))
    parts = (unit / direction.norm() * direction).split([weight.numel() for weight in weights.values()])
    shifts = {name: part.view_as(w).to(w.device) for (name, w), part in zip(weights.items(), parts, strict=True)}
    prompts = [prompt.text for prompt in run.held_out]
    before, points = held_out_rewards(run, weights), []
    done()
    for step in steps:
        after = held_out_rewards(run, {name: weight - step * shifts[name] for name, weight in weights.items()})
        points.append(point(step, before, after, prompts))
        done()
    return points


def measure(config: RunConfig, asked: Asked, done: Callable[[float], None] = lambda work: None) -> Row:
    """Measure one configuration; nothing of it is kept.

    Args:
        done: told of every part of `work(config, asked)` as it is done.
    Returns:
        Common share, improvement and its step, all points, and the median seconds of an iteration.
    Raises:
        UserError: the run cannot be prepared, or has no gradient, or its rewards fail.
    """
    gc.collect()  # a setting before this one leaves its model in cycles
    pictures = config.rollout.prompts_per_iteration * config.rollout.group_size
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(held_out_only(config, folder, asked))
        gradients, cpu_s, wall_s = collect_gradients(run, asked.gradients, lambda: done(2 * pictures))
        share = common_share(products(gradients))
        points = line_search(run, gradients.mean(0), asked.steps, lambda: done(asked.prompts))
    best = chosen(points)
    on_cpu = run.family.device.type == "cpu"
    return {
        "common_share": asdict(share),
        "improvement": asdict(best.gain),
        "step": best.step,
        "points": [asdict(point) for point in points],
        "norm": gradients.norm(dim=1).mean().item(),
        "seconds": statistics.median(cpu_s if on_cpu else wall_s),
        "wall_s": statistics.median(wall_s),
    }


def held_out_only(config: RunConfig, folder: str, asked: Asked) -> RunConfig:
    """The configuration as it is measured: in a folder of its own, evaluated by the trained rewards alone."""
    evaluation = config.evaluation.model_copy(update={"num_prompts": asked.prompts, "strict": None, "rewards": ()})
    most = asked.gradients + MAX_SKIPPED_IN_A_ROW
    trainer = config.trainer.model_copy(update={"num_iterations": most})
    return config.model_copy(update={"output_dir": folder, "evaluation": evaluation, "trainer": trainer})


def work(config: RunConfig, asked: Asked) -> float:
    """Work of one setting, in pictures; the updates of an iteration count as much as its rollout."""
    pictures = config.rollout.prompts_per_iteration * config.rollout.group_size
    return 2 * pictures * asked.gradients + asked.prompts * (1 + len(asked.steps))


def check(settings: Sequence[Setting], asked: Asked) -> None:
    """Refuse what cannot be measured, before a model is loaded.

    Raises:
        ConfigError: counts, settings or prompts that do not do.
    """
    asked.check()
    for setting in settings:
        if setting.config.resume is not None:
            raise ConfigError(
                f"resume must be null for a bench, got {setting.config.resume!r}; lora.init_from starts from an "
                "adapter, such as the folder of a checkpoint"
            )
        check_settings(setting.config)
        measured = held_out_only(setting.config, setting.config.output_dir, asked)
        _, held_out = open_run(measured)
        if (different := len({prompt.text for prompt in held_out})) < MIN_HELD_OUT:
            raise ConfigError(
                f"prompts.held_out must give at least {MIN_HELD_OUT} different prompts, two for each half, got "
                f"{different}; name a larger source"
            )
        check_prompts(measured)


def gradient_table(settings: Sequence[Setting], asked: Asked, output: Path | None, tell: Callable[[str], None]) -> None:
    """Measure every setting that `output` does not hold yet, and tell all as a Markdown table.

    Raises:
        UserError: a setting cannot be measured, or Ctrl-C; the rows before it are told, and in `output`.
    """
    check(settings, asked)
    same = {"gradients": asked.gradients, "prompts": asked.prompts, "steps": [*asked.steps], "machine": machine()}
    rows = Rows(output, "gradient", same, settings)
    missing = [setting for setting in settings if setting.label not in rows.rows]
    countdown = Countdown(sum(work(setting.config, asked) for setting in missing), console.print)
    try:
        for setting in missing:
            rows.add(setting, measure(setting.config, asked, lambda w, s=setting: countdown.done(w, s.label)))
    except KeyboardInterrupt:
        finished = sum(setting.label in rows.rows for setting in settings)
        where = f"they are in {str(output)!r}, and the same command goes on" if output else "--output FILE keeps them"
        raise UserError(f"stopped after {finished} of {len(settings)} rows; {where}") from None
    finally:
        found = [rows.rows[setting.label] for setting in settings if setting.label in rows.rows]
        if found:
            tell(as_table(found, asked))


def as_table(rows: Sequence[Row], asked: Asked) -> str:
    """The rows as a Markdown table, below what its columns mean."""
    head = (
        f"{asked.gradients} gradients, {asked.prompts} held-out prompts, {machine()}\n\n"
        "Common share: of the gradients' squared norm, what independent iterations have in common (jackknife over "
        "gradients).\nImprovement: held-out reward after the step against their mean, less that before; the step, in "
        "first steps of\nAdamW, is chosen on one half of the prompts, the improvement is that of the other (interval "
        "over prompts).\nSeconds: of an iteration, on a CPU those that it computes; both figures are also given for "
        "each of these.\nAll intervals are of 95%.\n"
    )
    columns = ("setting", "common share", "improvement", "at step", "seconds", "share a second", "improvement a second")
    return f"{head}\n{markdown_table(columns, [_cells(row) for row in rows])}"


def _cells(row: Row) -> list[str]:
    share, gain = _estimate(row["common_share"]), _estimate(row["improvement"])
    seconds = row["seconds"]
    rates = [Estimate(e.value / seconds, e.low / seconds, e.high / seconds).show(".2g") for e in (share, gain)]
    return [row["label"], share.show(), gain.show("+.3f"), f"{row['step']:g}", f"{seconds:.2f}", *rates]


def _estimate(bounds: dict[str, Any]) -> Estimate:
    """An estimate as a file has it, in which a bound that is not there is null."""
    return Estimate(**{name: math.nan if value is None else value for name, value in bounds.items()})
