"""Measure this machine: what each speed setting is worth, and what a model costs.

`ngrpo bench overhead` times one configuration as it is, then once with each setting the other way, then again as it
is, so that a machine that drifts shows. Every variant is a real trainer: its own model, prompts, rewards and updates.

`ngrpo bench gpu` needs no weights: a model of the configured shape with random ones is drawn with and trained, size by
size and batch by batch; time and memory do not depend on what the weights are.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ngrpo_lora.adapters import lora
from ngrpo_lora.bench.bare import chunk_sizes, timed
from ngrpo_lora.config import RunConfig, parse_config
from ngrpo_lora.devices import release_memory, resolve_device, resolve_dtype, without_cudnn_attention
from ngrpo_lora.errors import ConfigError, UserError, first_line
from ngrpo_lora.models._blueprint import blank_text, random_family
from ngrpo_lora.training.metering import STAGES
from ngrpo_lora.training.optimizers import make_optimizer
from ngrpo_lora.training.rollouts import rollout_weights
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import iterate

__all__ = ["Cost", "Timing", "gpu_table", "measure", "measure_cost", "overhead_table", "variants"]


@dataclass(frozen=True)
class Timing:
    """Medians over iterations, in seconds, and the GPU memory of the whole variant."""

    name: str
    seconds: dict[str, float]
    """Seconds by stage; `forwards` is what the rollout's forward passes take alone, without all that is around them."""
    peak_gib: float | None

    @property
    def total_s(self) -> float:
        """Seconds of one iteration, the sum of its stages."""
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
    if resolve_device(config.model.device).startswith("cuda"):
        other["trainer.tf32"] = not config.trainer.tf32
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
        UserError: the trainer cannot be built or run.
    """
    gc.collect()  # a variant that ran out of memory leaves its model in cycles
    with tempfile.TemporaryDirectory() as folder:
        evaluation = config.evaluation.model_copy(update={"num_prompts": 1})
        run = prepare(config.model_copy(update={"output_dir": folder, "evaluation": evaluation, "resume": None}))
        run.micro_batches.fix()
        iterate(run)
        rows = [iterate(run) for _ in range(iterations)]
        seconds = {stage: statistics.median(row[f"time/{stage}_s"] for row in rows) for stage in STAGES}
        seconds["forwards"] = forwards_alone(run)
    del run
    release_memory()
    if not torch.cuda.is_available():
        return Timing(name, seconds, None)
    return Timing(name, seconds, max(row[f"memory/{stage}_gib"] for row in rows for stage in STAGES))


@torch.no_grad()
def forwards_alone(run: Run) -> float:
    """Seconds that the forward passes of one rollout take by themselves: the same number, on batches of that size."""
    rollout, family = run.config.rollout, run.family
    text = family.encode([run.prompts.prompt(0)])
    size = rollout.micro_batch_size or rollout.group_size
    at_once = max(1, size // rollout.group_size) * rollout.group_size
    total = len(run.groups) * rollout.group_size
    batches = [b for n in chunk_sizes(total, at_once) for b in chunk_sizes(n, size)]
    latents = torch.randn(max(batches), *family.latent_shape, device=family.device)

    def passes() -> None:
        for batch in batches:
            for sigma in run.schedule.sigmas.tolist()[:-1]:
                family.velocity(latents[:batch], sigma, text[[0] * batch])

    with run.counter.paused(), rollout_weights(run):
        passes()
        return timed(passes).wall


def overhead_table(config: RunConfig, iterations: int, tell: Callable[[str], None]) -> None:
    """Measure all variants and tell each as a line of a Markdown table, as it is measured."""
    tell("| variant | rollout | of it forward passes | reward, waited for | update | iteration | ratio | peak GiB |")
    tell("|---|---|---|---|---|---|---|---|")
    first = None
    for name, variant in variants(config):
        try:
            timing = measure(name, variant, iterations)
        except (UserError, RuntimeError) as error:  # out of memory too: this variant is then no choice here
            tell(f"| {name} | not possible here: {first_line(error)} | | | | | | |")
            continue
        first = first or timing
        s = timing.seconds
        peak = "" if timing.peak_gib is None else f"{timing.peak_gib:.2f}"
        tell(
            f"| {name} | {s['rollout']:.3f} s | {s['forwards'] / s['rollout']:.0%} | {s['reward']:.3f} s "
            f"| {s['update']:.3f} s | {timing.total_s:.3f} s | {timing.total_s / first.total_s:.2f} | {peak} |"
        )


@dataclass(frozen=True)
class Cost:
    """Median seconds and peak GiB (None on a CPU) of the stages of one size and batch."""

    seconds: dict[str, float]
    peak_gib: dict[str, float | None]


def gpu_table(
    config: RunConfig, sizes_px: Sequence[int], batches: Sequence[int], repeats: int, tell: Callable[[str], None]
) -> None:
    """Measure every size and batch of a configuration's model and tell each as a line of a Markdown table."""
    model = config.model
    dtype = resolve_dtype(model.dtype, resolve_device(model.device))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    tell(
        f"{model.path}, random weights, {dtype}, quantization {model.quantization}, compile "
        f"{str(model.compile).lower()}, LoRA rank {config.lora.rank}, {config.optimizer.name}, gradient checkpointing "
        f"{str(config.trainer.gradient_checkpointing).lower()}, PyTorch {torch.__version__}, {name}"
    )
    tell("")
    tell("| size | batch | forward | forward + backward | optimizer step | decode | peak GiB, in this order |")
    tell("|---|---|---|---|---|---|---|")
    for size_px in sizes_px:
        for batch in batches:
            try:
                cost = measure_cost(config, size_px, batch, repeats)
            except torch.OutOfMemoryError:
                tell(f"| {size_px} px | {batch} | out of memory | | | | |")
                break
            times = " | ".join(f"{seconds:.3f} s" for seconds in cost.seconds.values())
            peaks = ", ".join("-" if gib is None else f"{gib:.2f}" for gib in cost.peak_gib.values())
            tell(f"| {size_px} px | {batch} | {times} | {peaks} |")
            gc.collect()


@without_cudnn_attention()
def measure_cost(config: RunConfig, size_px: int, batch: int, repeats: int) -> Cost:
    """Draw and train with random weights: medians of `repeats` calls after one that warms up."""
    gc.collect()  # a size that ran out of memory leaves its model in cycles
    model = config.model.model_copy(update={"height_px": size_px, "width_px": size_px})
    family = random_family(model)
    transformer = family.transformer
    lora.inject(transformer, config.lora, *family.lora_targets(config.lora.targets), seed=0)
    if config.trainer.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if model.compile:
        family.compile_blocks()
    parameters = lora.parameters(transformer)
    optimizer = make_optimizer(config.optimizer, parameters.values())
    text, latents = blank_text(family, batch), torch.randn(batch, *family.latent_shape, device=family.device)
    if family.guided:
        family.negative = blank_text(family, 1)

    def forward() -> None:
        with torch.no_grad():
            family.velocity(latents, 0.5, text)

    def update() -> None:
        family.velocity(latents, 0.5, text).square().mean().backward()

    def decode() -> None:
        with torch.no_grad():
            family.decode(latents[:1])

    stages = {"forward": forward, "update": update, "step": optimizer.step, "decode": decode}
    seconds, peaks = {}, {}
    for name, stage in stages.items():
        stage()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds[name] = statistics.median(timed(stage).wall for _ in range(repeats))
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return Cost(seconds, peaks)
