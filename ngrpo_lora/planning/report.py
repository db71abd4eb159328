"""A plan in words: the table of `ngrpo plan`, what to change where it does not fit, and a line for `ngrpo train`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ngrpo_lora.config import ModelRewardConfig, RunConfig, parse_config, show_value
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.planning.plan import GIB, MARGIN, Plan, make_plan
from ngrpo_lora.planning.sketch import sketch

__all__ = ["plan_lines", "plan_table", "plan_values", "shortage", "suggest", "verdict"]

Settings = dict[str, Any]


def plan_table(plan: Plan) -> Any:
    """The memory of a plan by item and stage, in GiB, as a table of rich's."""
    from rich.table import Table

    table = Table("GiB", *plan.gpu, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for item in dict.fromkeys(item for items in plan.gpu.values() for item in items):
        table.add_row(item, *(f"{items[item] / GIB:.2f}" if item in items else "" for items in plan.gpu.values()))
    sums = (f"{sum(items.values()) / GIB:.2f}" for items in plan.gpu.values())
    table.add_row("CPU" if plan.on_cpu else "each GPU", *sums, style="bold")
    return table


def plan_lines(plan: Plan, tflops: float | None = None, seconds_per_forward: float | None = None) -> Iterator[str]:
    """Say what the table does not, a line each: parameters, system memory, disk, evaluations, FLOPs, time.

    Args:
        tflops: sustained speed of a GPU, in 10^12 FLOPs a second.
        seconds_per_forward: measured time of one pass of the transformer for one sample; in place of `tflops`.
    """
    sizes = ", ".join(f"{name} {in_words(count)}" for name, count in plan.parameters.items())
    yield f"parameters: {sizes}; from {plan.origin}"
    yield from (f"not counted: {note}" for note in plan.notes)
    for stage, items in plan.system.items():
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in items.items())
        yield f"system memory, {stage}: {sum(items.values()) / GIB:.1f} GiB ({parts})"
    if plan.disk:
        yield f"disk: {plan.disk / GIB:.1f} GiB of text embeddings"
    nfe = plan.evaluations
    yield (
        f"function evaluations per sample: {nfe.old_per_sample:.2f} without gradient, {nfe.theta_per_sample:.2f} with; "
        f"per iteration: {nfe.old} and {nfe.theta}, for {nfe.samples} samples"
    )
    yield f"FLOPs: {plan.flops_per_forward / 1e12:.3g} T per forward pass, {plan.flops / 1e15:.3g} P per iteration"
    if seconds_per_forward is not None:
        tflops = plan.flops_per_forward / seconds_per_forward / 1e12
    if tflops is not None:
        seconds = plan.flops / (tflops * 1e12) / plan.gpus
        yield f"time: {seconds:.3g} s per iteration at {tflops:.3g} TFLOP/s, without encoding, rewards and evaluation"


def in_words(count: float) -> str:
    """A count as text with three digits and a unit, as in `12.3 M`."""
    size, unit = (1e9, "B") if count >= 1e9 else (1e6, "M") if count >= 1e6 else (1e3, "k")
    return f"{count / size:.3g} {unit}"


def verdict(plan: Plan, memory: float | None, advice: Sequence[str] | None) -> str:
    """Say a plan's peak, whether it fits into `memory` bytes, and what would make it fit."""
    needs = f"needs {plan.system_peak / GIB:.1f} GiB of system memory"
    if not plan.on_cpu:
        needs += f" and {plan.peak / GIB:.1f} GiB on each GPU ({plan.stage})"
    if memory is None:
        return needs
    usable = f"the {(1 - MARGIN) * memory / GIB:.1f} GiB that can be counted on of {memory / GIB:g} GiB"
    if plan.fits(memory):
        return f"{needs}: fits {usable}"
    remedy = "no setting makes it fit: more or larger GPUs, or a smaller model" if advice is None else " ".join(advice)
    return f"{needs}: more than {usable}\nwhat fits: {remedy}"


def plan_values(plan: Plan, gpu_memory: float | None, advice: Sequence[str] | None) -> dict[str, Any]:
    """All figures of a plan for `--json`, in bytes, FLOPs and counts."""
    peak = {"stage": plan.stage, "peak": plan.peak, "system_peak": plan.system_peak}
    fits = None if gpu_memory is None else plan.fits(gpu_memory)
    return asdict(plan) | peak | {"gpu_memory": gpu_memory, "fits": fits, "advice": advice}


def suggest(config: RunConfig, gpu_memory: float, gpus: int = 1) -> list[str] | None:
    """Suggest settings with which a run fits into `gpu_memory` bytes, as overrides; None where nothing helps.

    As many as it takes, cheapest first, without those that turn out not to be needed; a plan is made with each. The
    group size is never changed: a smaller group ranks worse.
    """
    together: Settings = {}
    for remedy in ways(config, gpus):
        together |= remedy
        if fits_with(config, together, gpu_memory, gpus):
            break
    else:
        return None
    for key in reversed([*together]):
        fewer = {other: value for other, value in together.items() if other != key}
        if fits_with(config, fewer, gpu_memory, gpus):
            together = fewer
    return show(together)


def ways(config: RunConfig, gpus: int) -> Iterator[Settings]:
    """Settings that make a run need less memory, cheapest first, but for those that it has already."""
    blocks = len(sketch(config.model, config.lora).blocks[0])
    ways: list[Settings] = [
        {"rollout.micro_batch_size": 1},
        {"trainer.micro_batch_size": 1},
        {"trainer.gradient_checkpointing": True},
        {"optimizer.name": "adamw_8bit"},
        {"model.text_encoders": "offload"},
        {"model.text_encoders": "cache"},
        {f"{key}.offload": True for key in network_keys(config)},
        {"model.dtype": "bfloat16"},
        {"rollout.merge_adapter": False},
        {"model.vae_tiling": True},
        {"model.quantization": "int8"},
        {"model.quantization": "nf4"},
    ]
    swap: Settings = {"trainer.gradient_checkpointing": True, "model.quantization": "none"}
    ways += [swap | {"model.swap_blocks": blocks * part // 8} for part in range(1, 9)]
    if gpus > 1:
        ways.append({"model.quantization": "none", "model.swap_blocks": 0, "trainer.strategy": "fsdp"})
    current = config.model_dump(mode="json")
    for way in ways:
        if any(lookup(current, key) != value for key, value in way.items()):
            yield way


def network_keys(config: RunConfig) -> Iterator[str]:
    """Dotted keys of the rewards that run networks here."""
    rewards = {f"rewards.train.{i}": reward for i, reward in enumerate(config.rewards.train)}
    rewards |= {f"evaluation.rewards.{i}": reward for i, reward in enumerate(config.evaluation.rewards)}
    yield from (key for key, reward in rewards.items() if isinstance(reward, ModelRewardConfig))


def lookup(data: Any, key: str) -> Any:
    """The value behind a dotted key of nested mappings and lists."""
    for part in key.split("."):
        data = data[int(part) if part.isdigit() else part]
    return data


def fits_with(config: RunConfig, settings: Settings, gpu_memory: float, gpus: int) -> bool:
    """Whether the plan fits once these settings are changed; not if they contradict others."""
    data = config.model_dump(mode="json")
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        lookup(data, section)[name] = value
    try:
        return make_plan(parse_config(data), gpus).fits(gpu_memory)
    except ConfigError:
        return False


def show(settings: Settings) -> list[str]:
    """Settings as `key=value` texts, as on the command line."""
    return [f"{key}={value if isinstance(value, str) else show_value(value)}" for key, value in settings.items()]


def shortage(config: RunConfig, free: float, gpus: int = 1) -> str | None:
    """The warning of `ngrpo train` where a GPU with so many free bytes will not be enough; None where it will.

    Raises:
        UserError: no such model, or it cannot be reached and the package does not know it.
    """
    plan = make_plan(config, gpus)
    if plan.peak <= free:
        return None
    advice = suggest(config, free / (1 - MARGIN), gpus)
    remedy = "try " + " ".join(advice) if advice else "no setting makes it fit; take a larger GPU or a smaller model"
    return (
        f"this run needs about {plan.peak / GIB:.1f} GiB of GPU memory ({plan.stage}), but {free / GIB:.1f} GiB are "
        f"free; {remedy}"
    )
