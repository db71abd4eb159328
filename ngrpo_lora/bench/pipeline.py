"""What a pipeline costs beyond its networks: `ngrpo bench pipeline`.

A picture of the FLUX pipeline takes a call of each text encoder, a forward pass of the transformer a step and a call of
the VAE's decoder. Three things are timed in turns: these calls alone, on the inputs that they had; our pipeline; and
diffusers' with our scheduler. The shortest time of each counts, as whatever else a machine does only adds to it; on a
CPU it is the time that the thread itself computes. Progress bars are off.

Networks are those of the embedded model, or its transformer several times as wide with random weights: what is around
the forward passes stays the same, so that its share falls as they grow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ngrpo_lora.bench import bare
from ngrpo_lora.bench.rows import machine
from ngrpo_lora.devices import resolve_device
from ngrpo_lora.hub.pipeline_file import sources
from ngrpo_lora.world import EMBEDDED

__all__ = ["Cost", "measure", "open_pipelines", "overhead_table", "recorded"]

PROMPT = "a red star above a blue heart"

Call = tuple[str, Callable[[], Any]]


@dataclass(frozen=True)
class Cost:
    """Cost of one picture in seconds, each the shortest of some calls."""

    num_steps: int
    forwards: float
    """All forward passes of the transformer, by themselves."""
    bare: float
    """All networks by themselves: these passes, the text encoders and the decoder."""
    ours: float
    stock: float

    def overhead(self, whole: float) -> str:
        """What `ours` or `stock` takes beyond the networks, as text in ms and percent."""
        return f"{(whole - self.bare) * 1e3:.1f} ms ({whole / self.bare - 1:+.1%})"


def open_pipelines(widen: int) -> tuple[Any, Any]:
    """Open two pipelines of the same networks: ours, and diffusers' with our scheduler.

    Args:
        widen: how many times as wide the transformer is; above 1 its weights are random.
    """
    from diffusers import DiffusionPipeline, FluxPipeline

    ours: Any = DiffusionPipeline.from_pretrained(
        EMBEDDED, custom_pipeline=str(sources() / "flux.py"), trust_remote_code=True, dtype=torch.float32
    )
    if widen > 1:
        config = dict(ours.transformer.config, num_attention_heads=widen * ours.transformer.config.num_attention_heads)
        ours.transformer = type(ours.transformer).from_config(config).eval()
    ours.to(resolve_device("auto"))
    stock = FluxPipeline(**ours.components)
    stock.scheduler = ours.scheduler_class.from_config(ours.scheduler.config)
    for pipeline in (ours, stock):
        pipeline.set_progress_bar_config(disable=True)
    return ours, stock


@contextmanager
def recorded(pipeline: Any) -> Iterator[list[Call]]:
    """Record all calls of a pipeline's networks in order: the network's name, and the call on its inputs."""
    calls: list[Call] = []

    def keep(name: str, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> None:
        calls.append((name, partial(function, *arguments, **named)))

    def decode(*arguments: Any, **named: Any) -> Any:
        keep("vae", own_decode, arguments, named)
        return own_decode(*arguments, **named)

    own_decode, pipeline.vae.decode = pipeline.vae.decode, decode
    hooks = [
        getattr(pipeline, name).register_forward_pre_hook(
            lambda module, arguments, named, name=name: keep(name, module, arguments, named), with_kwargs=True
        )
        for name in ("text_encoder", "text_encoder_2", "transformer")
    ]
    try:
        yield calls
    finally:
        del pipeline.vae.decode
        for hook in hooks:
            hook.remove()


def timed(draw: Callable[[], object]) -> float:
    """Seconds of one call: on a GPU to the end of what it is asked, on a CPU those that this thread computes."""
    if torch.cuda.is_available():
        return bare.timed(draw).wall
    start = time.thread_time()
    draw()
    return time.thread_time() - start


@torch.no_grad()
def measure(ours: Any, stock: Any, size_px: int, num_steps: int, repeats: int) -> Cost:
    """Time one picture drawn in every way in turns, once to warm up and `repeats` times."""
    settings = {"height": size_px, "width": size_px, "num_inference_steps": num_steps, "max_sequence_length": 64}
    with recorded(ours) as calls:
        ours(PROMPT, seeds=0, **settings)
    forwards = [call for name, call in calls if name == "transformer"]
    ways: dict[str, Callable[[], object]] = {
        "forwards": lambda: [call() for call in forwards],
        "bare": lambda: [call() for _, call in calls],
        "ours": lambda: ours(PROMPT, seeds=0, **settings),
        "stock": lambda: stock(PROMPT, generator=torch.Generator().manual_seed(0), **settings),
    }
    turns = [{way: timed(draw) for way, draw in ways.items()} for _ in range(1 + repeats)]
    return Cost(num_steps, **{way: min(turn[way] for turn in turns[1:]) for way in ways})


def overhead_table(
    widths: Sequence[int], sizes_px: Sequence[int], steps: Sequence[int], repeats: int, tell: Callable[[str], None]
) -> None:
    """Measure every width, size and number of steps, and tell each as a line of a Markdown table."""
    tell(f"The shortest of {repeats}, {machine()}\n")
    tell("| transformer | size | steps | a forward pass | all networks | our pipeline adds | diffusers' adds |")
    tell("|---|---|---|---|---|---|---|")
    for widen in widths:
        ours, stock = open_pipelines(widen)
        parameters = sum(parameter.numel() for parameter in ours.transformer.parameters())
        for size_px in sizes_px:
            for num_steps in steps:
                cost = measure(ours, stock, size_px, num_steps, repeats)
                pass_ms = cost.forwards / num_steps * 1e3
                tell(
                    f"| {parameters / 1e6:.0f} M | {size_px} px | {num_steps} | {pass_ms:.1f} ms "
                    f"| {cost.bare * 1e3:.1f} ms | {cost.overhead(cost.ours)} | {cost.overhead(cost.stock)} |"
                )
