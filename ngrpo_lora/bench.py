"""What each speed setting is worth on this machine: `ngrpo bench overhead`.

One configuration is timed as it is, then once with each setting the other way, then again as it is, so that a
machine that drifts shows. Every variant is a real trainer: its own model, prompts, rewards and updates.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ngrpo_lora.config import RunConfig, parse_config
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.trainer import Trainer

__all__ = ["Timing", "measure", "overhead_table", "variants"]

STAGES = ("rollout", "reward", "update")


@dataclass(frozen=True)
class Timing:
    """Medians over iterations, in seconds, and the GPU memory of the whole variant."""

    name: str
    seconds: dict[str, float]
    """By stage; `forwards` is what the rollout's forward passes take alone, without all that is around them."""
    peak_gib: float | None

    @property
    def total_s(self) -> float:
        """One iteration."""
        return sum(self.seconds[stage] for stage in STAGES)


def variants(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """The configuration as it is, with each setting that is about speed the other way, and as it is again."""
    group, dtype = config.rollout.group_size, config.model.dtype
    shared = (config.rollout.micro_batch_size or group) > group
    other = {
        "rollout.merge_adapter": not config.rollout.merge_adapter,
        "rollout.micro_batch_size": group if shared else group * config.rollout.prompts_per_iteration,
        "trainer.gradient_checkpointing": not config.trainer.gradient_checkpointing,
        "trainer.micro_batch_size": max(1, config.trainer.micro_batch_size // 4),
        "model.compile": not config.model.compile,
        "model.dtype": "float32" if dtype != "float32" else "bfloat16",
    }
    yield "as configured", config
    for key, value in other.items():
        section, field = key.split(".")
        data = config.model_dump(mode="json")
        data[section][field] = value
        try:
            yield f"{key}={str(value).lower()}", parse_config(data)
        except ConfigError:  # the two do not go together, such as NF4 and compile
            continue
    yield "as configured, again", config


def measure(name: str, config: RunConfig, iterations: int) -> Timing:
    """Time `iterations` of a trainer after one that warms up; nothing of it is kept.

    Raises:
        UserError: it cannot be built or run.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        evaluation = config.evaluation.model_copy(update={"num_prompts": 1})
        trainer = Trainer(config.model_copy(update={"output_dir": folder, "evaluation": evaluation, "resume": None}))
        trainer.step()
        rows = [trainer.step() for _ in range(iterations)]
        seconds = {stage: statistics.median(row[f"time/{stage}_s"] for row in rows) for stage in STAGES}
        seconds["forwards"] = forwards_alone(trainer)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    del trainer
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return Timing(name, seconds, peak)


@torch.no_grad()
def forwards_alone(trainer: Trainer) -> float:
    """Seconds that the forward passes of one rollout take by themselves: the same number, on batches of that size."""
    rollout, family = trainer.config.rollout, trainer.family
    text = family.encode([trainer.prompts.prompt(0).text])
    size = rollout.micro_batch_size or rollout.group_size
    at_once = max(1, size // rollout.group_size) * rollout.group_size
    total = len(trainer.groups) * rollout.group_size
    batches = [b for n in chunk_sizes(total, at_once) for b in chunk_sizes(n, size)]
    latents = torch.randn(max(batches), *family.latent_shape, device=family.device)

    def run() -> None:
        for batch in batches:
            for sigma in trainer.sigmas.tolist()[:-1]:
                family.velocity(latents[:batch], sigma, text[[0] * batch])

    with trainer.counter.paused(), trainer.rollout_weights():
        run()
        return timed(run)


def chunk_sizes(total: int, size: int) -> list[int]:
    """`total` in pieces of `size`, the last one smaller."""
    return [min(size, total - start) for start in range(0, total, size)]


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, to the end of what it asks of the GPU."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def overhead_table(config: RunConfig, iterations: int, tell: Callable[[str], None]) -> None:
    """Measure all variants and tell each as a line of a Markdown table, as it is measured."""
    tell("| variant | rollout | of it forward passes | reward, waited for | update | iteration | ratio | peak GiB |")
    tell("|---|---|---|---|---|---|---|---|")
    first = None
    for name, variant in variants(config):
        try:
            timing = measure(name, variant, iterations)
        except (UserError, RuntimeError) as error:  # out of memory too: this variant is then no choice here
            tell(f"| {name} | not possible here: {next(iter(str(error).splitlines()), '')} | | | | | | |")
            continue
        first = first or timing
        s = timing.seconds
        peak = "" if timing.peak_gib is None else f"{timing.peak_gib:.2f}"
        tell(
            f"| {name} | {s['rollout']:.3f} s | {s['forwards'] / s['rollout']:.0%} | {s['reward']:.3f} s "
            f"| {s['update']:.3f} s | {timing.total_s:.3f} s | {timing.total_s / first.total_s:.2f} | {peak} |"
        )
