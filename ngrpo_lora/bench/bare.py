"""Measure what an iteration costs beyond its model: the iteration, in turn with nothing but the calls that it makes.

Bare calls are the text encoders' passes for new prompts, the transformer's forward and backward passes, the VAE's
decodings, the rewards' own functions and the optimizer's steps, as many and on batches of the same sizes. Schedules,
groups, noises, the merged adapter, the objective, threads, guests and metrics are what is missing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora.bench.held import HeldAlgorithm
from ngrpo_lora.config import RunConfig
from ngrpo_lora.devices import without_cudnn_attention
from ngrpo_lora.evaluation.statistics import Estimate, mean_interval
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.planning.misfits import check_prompts
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.training.metering import STAGES
from ngrpo_lora.training.rewarding import samples
from ngrpo_lora.training.rollouts import prompts_of, rollout_weights
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import iterate
from ngrpo_lora.types import RewardBatch

__all__ = ["Bare", "Seconds", "bare_table", "chunk_sizes", "in_turn", "measure_bare", "opened", "timed"]


class Seconds(NamedTuple):
    """By the clock, to the end of what a GPU was asked for, and of all the process's CPU time."""

    wall: float
    cpu: float


class Bare(NamedTuple):
    """What an iteration costs, and its bare calls.

    iteration, calls: medians, by stage and of `all` of it. An iteration's stages have no CPU time, NaN: rewards work
        in threads beside the rollout.
    wall_ratio, cpu_ratio: `all` of an iteration over that of the calls measured after it, the mean over these pairs;
        what slows both down is not in it.
    """

    iteration: dict[str, Seconds]
    calls: dict[str, Seconds]
    wall_ratio: Estimate
    cpu_ratio: Estimate


def bare_table(config: RunConfig, iterations: int, tell: Callable[[str], None]) -> None:
    """Measure and tell an iteration over its bare calls, as a Markdown table; intervals are over pairs of both."""
    check_prompts(config)
    found = measure_bare(config, iterations)
    tell(f"| | {' | '.join(STAGES)} | all | all, CPU time |")
    tell("|---|---|---|---|---|---|")
    rows = [[*(part.wall for part in parts.values()), parts["all"].cpu] for parts in (found.iteration, found.calls)]
    for name, row in zip(("iteration", "bare calls"), rows, strict=True):
        tell(f"| {name} | {' | '.join(f'{seconds:.3f} s' for seconds in row)} |")
    stages = [f"{found.iteration[stage].wall / found.calls[stage].wall:.3f}" for stage in STAGES]
    cells = [*stages, found.wall_ratio.show(), found.cpu_ratio.show()]
    tell(f"| iteration / bare calls | {' | '.join(cells)} |")


def measure_bare(config: RunConfig, iterations: int) -> Bare:
    """Time `iterations` and as many times their bare calls, in turn, after one of each that warms up.

    Raises:
        UserError: the trainer cannot be built or run.
    """
    with opened(config) as run:
        return in_turn(run, iterations)


@contextmanager
def opened(config: RunConfig, family: BaseFamily | None = None) -> Iterator[Run]:
    """A run to be timed, which trains all its groups, whatever their rewards are; its folder goes with the context.

    Args:
        family: a model without an adapter, in place of the configured one.
    Raises:
        UserError: the trainer cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        evaluation = config.evaluation.model_copy(update={"num_prompts": 1})
        changed = config.model_copy(update={"output_dir": folder, "evaluation": evaluation, "resume": None})
        run = prepare(changed, family=family)
        run.micro_batches.fix()
        run.algorithm = HeldAlgorithm(run.algorithm)
        yield run


def in_turn(run: Run, iterations: int) -> Bare:
    """As `measure_bare`, of a run that is prepared; its conditionings may come from a cache."""
    ours: list[dict[str, Seconds]] = []
    bare: list[dict[str, Seconds]] = []
    for _ in range(1 + iterations):
        prompts = prompts_of(run)
        by_key = {prompt.condition: prompt for prompt in prompts} if run.family.cache is None else dict[str, Prompt]()
        met = run.family.recent.of(by_key)
        new = [prompt for key, prompt in by_key.items() if key not in met]
        ours.append(whole_iteration(run))
        with run.counter.paused():
            bare.append(bare_iteration(run, prompts, new))
    pairs = [(one["all"], other["all"]) for one, other in zip(ours[1:], bare[1:], strict=True)]
    wall, cpu = zip(*((one.wall / other.wall, one.cpu / other.cpu) for one, other in pairs), strict=True)
    return Bare(medians(ours[1:]), medians(bare[1:]), *(mean_interval(few, range(iterations)) for few in (wall, cpu)))


def medians(rows: list[dict[str, Seconds]]) -> dict[str, Seconds]:
    """The median of every column."""
    return {name: Seconds(*map(statistics.median, zip(*(row[name] for row in rows), strict=True))) for name in rows[0]}


def timed(function: Callable[[], object]) -> Seconds:
    """The time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def whole_iteration(run: Run) -> dict[str, Seconds]:
    """The time of an iteration of the trainer."""
    metrics: dict[str, float] = {}
    total = timed(lambda: metrics.update(iterate(run)))
    return {stage: Seconds(metrics[f"time/{stage}_s"], torch.nan) for stage in STAGES} | {"all": total}


@without_cudnn_attention()
def bare_iteration(run: Run, prompts: Sequence[Prompt], new: Collection[Prompt]) -> dict[str, Seconds]:
    """The time of the calls of one iteration, and of nothing else.

    Args:
        prompts: of the iteration's groups. new: those that it had to encode.
    """
    rollout, family, optimizer = run.config.rollout, run.family, run.lora_step.optimizer
    group, size = rollout.group_size, rollout.micro_batch_size or rollout.group_size
    count, at_once = len(run.groups) * group, max(1, size // group) * group
    images = list[list[Image.Image]]()
    text = family.encode(prompts[:1])
    latents = torch.randn(max(size, run.config.trainer.micro_batch_size), *family.latent_shape, device=family.device)
    updates = transitions(run)

    def velocity(batch: int, sigma: float) -> Tensor:
        return family.velocity(latents[:batch], sigma, text[[0] * batch])

    @torch.no_grad()
    def draw() -> None:
        for prompt in new:
            family.encode_one(prompt)
        for batch in (b for n in chunk_sizes(count, at_once) for b in chunk_sizes(n, size)):
            for sigma in run.schedule.sigmas.tolist()[:-1]:
                velocity(batch, sigma)
        for _ in run.groups:
            images.append([image for n in chunk_sizes(group, size) for image in family.decode(latents[:n])])

    def score() -> None:
        for prompt, own in zip(prompts, images, strict=True):
            shown = samples(run, [prompt] * group, own)
            for reward in run.scorer.rewards.values():
                reward.outcomes(shown, [*reward.parts(shown)])

    def move() -> None:
        for index, many in enumerate(updates):
            for batch in chunk_sizes(many, run.config.trainer.micro_batch_size):
                with torch.no_grad():
                    if run.algorithm.needs_old and index:
                        velocity(batch, 0.5)
                    if run.algorithm.needs_reference:
                        velocity(batch, 0.5)
                velocity(batch, 0.5).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    with rollout_weights(run):
        drawn = timed(draw)
    parts = dict(zip(STAGES, (drawn, timed(score), timed(move)), strict=True))
    return parts | {"all": Seconds(*map(sum, zip(*parts.values(), strict=True)))}


def transitions(run: Run) -> list[int]:
    """How many transitions each update of an iteration has."""
    shape = (run.config.rollout.prompts_per_iteration, run.config.rollout.group_size)
    blank = RewardBatch(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.bool), {})
    return [*map(len, run.algorithm.updates(run.algorithm.advantages(blank), 0, run.iteration))]


def chunk_sizes(total: int, size: int) -> list[int]:
    """Sizes of the pieces of `total` items: `size` each, the last one smaller."""
    return [min(size, total - start) for start in range(0, total, size)]
