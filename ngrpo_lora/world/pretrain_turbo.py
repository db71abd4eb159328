"""Distil the embedded model into four steps, as a LoRA: `python -m ngrpo_lora.world.pretrain_turbo`.

`model.fuse: embedded-turbo` adds it into the base, as distilled LoRAs of published models are used. A step of the
student goes where its teacher, the embedded model itself, comes in four steps of DPM++ 2M: its velocity is the mean of
the teacher's on the way (as in progressive distillation, arXiv 2202.00512, but four steps at once, at the noise levels
of its one schedule alone). Four stages, each seeded and each leaving a file (long ones every 200 steps), so that a
stopped run goes on:

    trajectories   the teacher's, in 16 steps
    first          a LoRA that learns their quarters
    own            where the teacher comes from the points of the student's own trajectories
    turbo          the LoRA, trained on both

Held-out scenes (`scenes.split_scenes`) are in none. About half an hour on one CPU core.
"""

# diffusers annotates its constructors' tuples and its outputs too narrowly:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ngrpo_lora.equations.solvers import VelocityFn, dpmpp_2m, euler, flow_sigmas
from ngrpo_lora.world import EMBEDDED, EMBEDDED_TURBO
from ngrpo_lora.world._parts import SHARES, SHIFT, TRAIN_SCENES, Flow, caption
from ngrpo_lora.world.distil import optimise
from ngrpo_lora.world.scenes import sample_scene

log = logging.getLogger(__name__)

STEPS, SUBSTEPS, BATCH = 4, 4, 32
SIGMAS = flow_sigmas(STEPS, SHIFT)
FINE = flow_sigmas(STEPS * SUBSTEPS, SHIFT)  # every fourth is one of SIGMAS

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")


class Steps(NamedTuple):
    """Steps that the student is to make, N of each."""

    start: Tensor
    """(N, 16, 64) float16."""
    step: Tensor
    """(N,) int64, 0 to 3."""
    velocity: Tensor
    """(N, 16, 64) float16, the mean of the teacher's until the next of SIGMAS."""
    captions: list[str]
    """N of them."""


def make_student(rank: int) -> Flow:
    """The embedded model, which is the teacher, with a LoRA on every layer of its blocks, which is to be the student.

    The text encoders are not trained.
    """
    base = FluxPipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32)
    tokenizers = base.tokenizer, base.tokenizer_2
    flow = Flow(base.transformer, (base.text_encoder, base.text_encoder_2), tokenizers).requires_grad_(False)
    torch.manual_seed(0)
    layers = [*ATTENTION, *FEED_FORWARD]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, exclude_modules="proj_out")  # the model's last
    flow.transformer.add_adapter(config)
    return flow


@contextmanager
def teacher(flow: Flow) -> Iterator[None]:
    """The model without the LoRA, within the context."""
    flow.transformer.disable_adapters()
    try:
        yield
    finally:
        flow.transformer.enable_adapters()


def velocity_of(flow: Flow, captions: list[str]) -> VelocityFn:
    """Velocities of B latents (B, 16, 64), one of each caption, at one noise level."""
    ids = flow.tokenize(captions)
    return lambda latents, sigma: flow(latents, torch.full((len(latents),), sigma), *ids)


@torch.no_grad()
def ask(path: Path, flow: Flow, trajectories: int, own: bool) -> Steps:
    """Where the teacher comes from the points of its own trajectories, or of the student's, which the LoRA draws.

    The first are in one piece, so that their solver remembers the step before.
    """
    if not path.exists():
        rng, parts, captions = np.random.default_rng(21 + own), list[tuple[Tensor, ...]](), list[str]()
        generator = torch.Generator().manual_seed(21 + own)
        for batch in range(trajectories // 100):
            texts = [caption(sample_scene(rng, TRAIN_SCENES, SHARES), rng) for _ in range(100)]
            noise = FluxPipeline._pack_latents(torch.randn(100, 16, 8, 8, generator=generator), 100, 16, 8, 8)
            starts, ends = (own_steps if own else known_steps)(flow, velocity_of(flow, texts), noise)
            for step, (start, end) in enumerate(zip(starts, ends, strict=True)):
                velocity = (end - start) / (SIGMAS[step + 1] - SIGMAS[step])
                parts.append((start.half(), torch.full((100,), step), velocity.half()))
                captions += texts
            if batch % 20 == 19:
                log.info("%s %d/%d", path.stem, batch + 1, trajectories // 100)
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        save_file(dict(zip(Steps._fields, columns, strict=False)), path, {"captions": "\n".join(captions)})
    with safe_open(path, "pt") as file:
        return Steps(*map(file.get_tensor, Steps._fields[:3]), file.metadata()["captions"].split("\n"))


def known_steps(flow: Flow, velocity: VelocityFn, noise: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Where each step starts on the teacher's trajectories from noises (B, 16, 64), and where it ends."""
    with teacher(flow):
        points = dpmpp_2m(velocity, noise, FINE)[::SUBSTEPS]
    return points[:-1], points[1:]


def own_steps(flow: Flow, velocity: VelocityFn, noise: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Where each step starts on the student's trajectories from noises (B, 16, 64), and where the teacher ends it."""
    starts = euler(velocity, noise, SIGMAS)[:-1]
    levels = [FINE[step * SUBSTEPS : (step + 1) * SUBSTEPS + 1] for step in range(STEPS)]
    with teacher(flow):
        return starts, [dpmpp_2m(velocity, start, some)[-1] for start, some in zip(starts, levels, strict=True)]


def both(one: Steps, other: Steps) -> Steps:
    """The steps of two kinds together."""
    tensors = (torch.cat(pair) for pair in zip(one[:3], other[:3], strict=True))
    return Steps(*tensors, one.captions + other.captions)


def train(path: Path, flow: Flow, known: Steps, steps: int, peak: float) -> None:
    """Train the LoRA on these steps; leaves averaged weights in it."""
    adapter = nn.ParameterList(p for p in flow.transformer.parameters() if p.requires_grad)
    if not path.exists():
        average = AveragedModel(adapter, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        optimise(adapter, steps, peak, path, loss_of(flow, known), average)
    load_model(adapter, path)


def loss_of(flow: Flow, known: Steps) -> Callable[[int], Tensor]:
    """The squared error of a step's batch, which is the same whenever it is drawn."""
    texts = sorted(set(known.captions))
    ids, places = flow.tokenize(texts), {text: place for place, text in enumerate(texts)}
    told = torch.tensor([places[text] for text in known.captions])

    def loss_fn(step: int) -> Tensor:
        chosen = torch.randint(len(told), (BATCH,), generator=torch.Generator().manual_seed(step))
        sigma = SIGMAS[known.step[chosen]]
        velocity = flow(known.start[chosen].float(), sigma, *(part[told[chosen]] for part in ids))
        return F.mse_loss(velocity, known.velocity[chosen].float())

    return loss_fn


def save(folder: Path, flow: Flow) -> None:
    """Write the LoRA in bfloat16, as diffusers writes LoRAs."""
    weights = {name: weight.bfloat16() for name, weight in get_peft_model_state_dict(flow.transformer).items()}
    peft = flow.transformer.peft_config["default"].to_dict()
    FluxPipeline.save_lora_weights(folder, weights, transformer_lora_adapter_metadata=peft)


def main() -> None:
    """Run the stages that have not been run, then write the LoRA to `--output-dir`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/turbo"), help="where the stages leave files")
    parser.add_argument("--output-dir", type=Path, default=EMBEDDED_TURBO, help="the LoRA's folder")
    parser.add_argument("--trajectories", type=int, default=16_000, help="of the teacher, a multiple of 200")
    parser.add_argument("--steps", type=int, default=5_000, help="of training, in either stage")
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.trajectories % 200 or min(args.trajectories, args.steps, args.rank) <= 0:
        parser.error(f"counts must be positive and --trajectories a multiple of 200, got {vars(args)}")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    flow = make_student(args.rank)
    known = ask(args.work_dir / "trajectories.safetensors", flow, args.trajectories, own=False)
    train(args.work_dir / "first.safetensors", flow, known, args.steps, 2e-3)
    known = both(known, ask(args.work_dir / "own.safetensors", flow, args.trajectories // 2, own=True))
    train(args.work_dir / "turbo.safetensors", flow, known, args.steps, 1e-3)
    save(args.output_dir, flow)


if __name__ == "__main__":
    main()
