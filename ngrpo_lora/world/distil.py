"""Make the embedded model from a larger one: `python -m ngrpo_lora.world.distil --teacher runs/teacher`.

The larger one, of width 256 and 5.6 M parameters, is `ngrpo_lora.world.pretrain`'s. This one costs 0.4 of it
per picture, so that the demo and the comparisons of algorithms fit on two CPU cores, and leaves more to gain. Five
stages, each seeded and each leaving a file (a long one every 200 steps), so that a stopped run goes on:

    targets   the teacher's velocity at noised latents of rendered scenes: what the student learns to say
    vae       a small AutoencoderKL that shares the teacher's latents
    flow      FluxTransformer2DModel of width 128 and the teacher's text encoders on 12 tokens, EMA
    own       the teacher's velocity where the student itself goes from noise to picture
    refine    the flow again, on both kinds of targets

The teacher's velocity is a mean over all pictures that could be under the noise, a target with less noise of its own
than a single picture. A student that has only seen noised pictures cannot turn back where its own steps have left
them, and draws no object at all; its own latents teach it to (as in DAgger, arXiv 1011.0686). Held-out scenes
(`scenes.split_scenes`) are in no stage.
"""

# diffusers annotates its constructors' tuples and its outputs too narrowly:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel

from ngrpo_lora.records.files import written
from ngrpo_lora.world._parts import Flow, assemble, batch_of_images, make_transformer, make_vae, noised, shifted
from ngrpo_lora.world.scenes import place, scatter

log = logging.getLogger(__name__)

MAX_TOKENS = 12  # the longest caption has 11 tokens of either kind
NOISES, BATCH = 3, 32  # noise levels of each rendered scene; latents of a training step


class Targets(NamedTuple):
    """What a teacher says at N latents."""

    noised: Tensor
    """(N, 16, 64) float16."""
    sigma: Tensor
    """(N,) float32."""
    velocity: Tensor
    """(N, 16, 64) float16."""
    captions: list[str]
    """N of them."""


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Factor of the peak learning rate: linear warm-up, then linear decay to 0."""
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


def optimise(
    module: nn.Module,
    steps: int,
    peak: float,
    path: Path,
    loss_fn: Callable[[int], Tensor],
    ema: AveragedModel,
) -> None:
    """Minimise `loss_fn(step)` by AdamW and average the weights in `ema`, whose module is then saved to `path`.

    Every 200 steps all that it holds goes into a `.partial` file beside `path`, from which a stopped run goes on.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    stateful: list[Any] = [module, optimizer, schedule, ema]
    partial, first = path.with_suffix(".partial"), 0
    if partial.exists():
        first, states = torch.load(partial, weights_only=True)
        for part, state in zip(stateful, states, strict=True):
            part.load_state_dict(state)
    start, mean_loss = time.perf_counter(), 0.0
    for step in range(first, steps):
        loss = loss_fn(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.update_parameters(module)
        mean_loss += (loss.item() - mean_loss) / min(step - first + 1, 100)
        if (step + 1) % 200 == 0:
            log.info("%s %d/%d loss %.5f %.0f s", path.stem, step + 1, steps, mean_loss, time.perf_counter() - start)
            with written(partial) as unfinished:
                torch.save((step + 1, [part.state_dict() for part in stateful]), unfinished)
    save_model(ema.module, str(path))


def train_vae(path: Path, teacher: AutoencoderKL, steps: int) -> AutoencoderKL:
    """Train the small VAE, or load it: its encoder repeats the teacher's, its decoder draws from the teacher's latents.

    The decoder sees the latents' means with up to the whole of their posterior's noise, as drawn latents are not exact.
    """
    vae = make_vae((8, 16, 32, 64), norm_groups=1)  # a group of one channel would lose its mean, and with it colours
    if not path.exists():
        vae.to(memory_format=torch.channels_last)

        def loss_fn(step: int) -> Tensor:
            rng, generator = np.random.default_rng((5, step)), torch.Generator().manual_seed(step)
            images = torch.cat([batch_of_images(16, rng, layout)[0] for layout in (scatter, place)])
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                known = teacher.encode(images).latent_dist
                noise = torch.randn(known.mean.shape, generator=generator) * torch.rand(
                    32, 1, 1, 1, generator=generator
                )
            own, decoded = vae.encode(images).latent_dist, vae.decode(known.mean + noise * known.std).sample
            apart = F.mse_loss(own.mean, known.mean) + F.mse_loss(own.logvar, known.logvar)
            return (decoded - images).abs().mean() + 0.5 * (decoded - images).square().mean() + 0.1 * apart

        optimise(vae, steps, 3e-3, path, loss_fn, AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.99)))
    load_model(vae, path)
    return vae.eval()


@torch.no_grad()
def ask(path: Path, teacher: Flow, vae: AutoencoderKL, scenes: int) -> Targets:
    """What the teacher says of `scenes` scenes at `NOISES` noise levels each; one caption in twenty is empty."""
    if not path.exists():
        rng, generator = np.random.default_rng(6), torch.Generator().manual_seed(6)
        parts, captions = [], []
        vae.to(memory_format=torch.channels_last)
        for batch in range(scenes // 100):
            images, texts = batch_of_images(100, rng, place)
            images = images.contiguous(memory_format=torch.channels_last)
            means = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
            clean = FluxPipeline._pack_latents(means, 100, 16, 8, 8).repeat(NOISES, 1, 1)
            texts = ["" if rng.random() < 0.05 else text for text in texts * NOISES]
            latents, sigma, _ = noised(clean, generator)
            parts.append((latents, sigma, teacher(latents, sigma, *teacher.tokenize(texts))))
            captions += texts
            if batch % 40 == 39:
                log.info("targets %d/%d", batch + 1, scenes // 100)
        save_targets(path, parts, captions)
    return load_targets(path)


@torch.no_grad()
def ask_along(path: Path, teacher: Flow, student: Flow, trajectories: int) -> Targets:
    """What the teacher says at `NOISES` latents of each of the student's trajectories, of 4 to 16 Euler steps."""
    if not path.exists():
        rng, generator = np.random.default_rng(8), torch.Generator().manual_seed(8)
        parts, captions = [], []
        for batch in range(trajectories // 100):
            _, texts = batch_of_images(100, rng, place)
            ids, teacher_ids = student.tokenize(texts), teacher.tokenize(texts)
            steps = int(rng.integers(4, 17))
            sigmas = shifted(torch.linspace(1, 0, steps + 1))
            asked = torch.rand(100, steps, generator=generator).argsort(1)[:, :NOISES]  # steps of each trajectory
            latents = torch.randn(100, 16, 64, generator=generator)
            for step, (sigma, after) in enumerate(pairwise(sigmas)):
                here = (asked == step).any(1)
                if here.any():
                    told = teacher(latents[here], sigma.expand(int(here.sum())), *(part[here] for part in teacher_ids))
                    parts.append((latents[here], sigma.expand(len(told)), told))
                    captions += [texts[i] for i in here.nonzero().flatten()]
                latents = latents + (after - sigma) * student(latents, sigma.expand(100), *ids)
            if batch % 20 == 19:
                log.info("own %d/%d", batch + 1, trajectories // 100)
        save_targets(path, parts, captions)
    return load_targets(path)


def save_targets(path: Path, parts: list[tuple[Tensor, Tensor, Tensor]], captions: list[str]) -> None:
    """Write latents, sigma and the teacher's velocity, batch by batch, and a caption of each."""
    noised, sigma, velocity = (torch.cat(column) for column in zip(*parts, strict=True))
    tensors = {"noised": noised.half(), "sigma": sigma, "velocity": velocity.half()}
    save_file(tensors, path, {"captions": "\n".join(captions)})


def load_targets(path: Path) -> Targets:
    """Read the targets that `save_targets` wrote."""
    with safe_open(path, "pt") as file:
        return Targets(*map(file.get_tensor, Targets._fields[:3]), file.metadata()["captions"].split("\n"))


def both(one: Targets, other: Targets) -> Targets:
    """The targets of two kinds together."""
    tensors = (torch.cat(pair) for pair in zip(one[:3], other[:3], strict=True))
    return Targets(*tensors, one.captions + other.captions)


def shorten(encoder: CLIPTextModel) -> CLIPTextModel:
    """A CLIP text encoder for `MAX_TOKENS` tokens, with the weights of one for more."""
    config = copy.deepcopy(encoder.config)
    config.max_position_embeddings = MAX_TOKENS
    short, weights = CLIPTextModel(config), encoder.state_dict()
    key = next(name for name in weights if name.endswith("position_embedding.weight"))
    short.load_state_dict(weights | {key: weights[key][:MAX_TOKENS]})
    return short


def make_student(teacher: FluxPipeline) -> Flow:
    """One head of width 128 and three single blocks, 1.5 M parameters; text encoders start as the teacher's."""
    tokenizers = copy.deepcopy(teacher.tokenizer), copy.deepcopy(teacher.tokenizer_2)
    for tokenizer in tokenizers:
        tokenizer.model_max_length = MAX_TOKENS
    transformer = make_transformer(heads=1, single_blocks=3)
    return Flow(transformer, (shorten(teacher.text_encoder), copy.deepcopy(teacher.text_encoder_2)), tokenizers)


def train_flow(path: Path, student: Flow, targets: Targets, steps: int, peak: float) -> None:
    """Train the student on the teacher's clean predictions; leaves averaged weights in `student`.

    An error of velocities counts by sigma^2 then: most at the noise levels where a picture's layout is settled.
    """
    if not path.exists():
        texts = sorted(set(targets.captions))
        clip_ids, t5_ids = student.tokenize(texts)
        places = {text: place for place, text in enumerate(texts)}
        caption = torch.tensor([places[text] for text in targets.captions])

        def loss_fn(step: int) -> Tensor:
            chosen = torch.randint(len(caption), (BATCH,), generator=torch.Generator().manual_seed(step))
            told, sigma = caption[chosen], targets.sigma[chosen]
            velocity = student(targets.noised[chosen].float(), sigma, clip_ids[told], t5_ids[told])
            error = sigma[:, None, None] * (velocity - targets.velocity[chosen].float())  # of clean predictions
            return error.square().mean()

        ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        optimise(student, steps, peak, path, loss_fn, ema)
    load_model(student, path)


STAGES = ("targets", "vae", "flow", "own", "refine")


def main() -> None:
    """Run the stages that have not been run, then write the pipeline to `--output-dir`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="the pipeline that pretrain made")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/distil"), help="where the stages leave files")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "model", help="the pipeline")
    parser.add_argument("--scenes", type=int, default=24_000, help="scenes that the teacher sees, a multiple of 100")
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--flow-steps", type=int, default=14_000)
    parser.add_argument("--trajectories", type=int, default=19_200, help="of the student, a multiple of 100")
    parser.add_argument("--refine-steps", type=int, default=10_000)
    parser.add_argument("--only", choices=STAGES, help="one stage alone, so that two can run at once")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    counts = args.scenes, args.trajectories, args.vae_steps, args.flow_steps, args.refine_steps
    if args.scenes % 100 or args.trajectories % 100 or min(counts) <= 0:
        parser.error(f"counts must be positive, --scenes and --trajectories multiples of 100, got {vars(args)}")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    teacher = FluxPipeline.from_pretrained(args.teacher, torch_dtype=torch.float32)
    torch.manual_seed(0)
    student = make_student(teacher)
    if args.only in (None, "vae"):
        vae = train_vae(args.work_dir / "vae.safetensors", teacher.vae, args.vae_steps)
    if args.only != "vae":
        flow = Flow(
            teacher.transformer,
            (teacher.text_encoder, teacher.text_encoder_2),
            (teacher.tokenizer, teacher.tokenizer_2),
        )
        targets = ask(args.work_dir / "targets.safetensors", flow, teacher.vae, args.scenes)
    if args.only in (None, "flow", "own", "refine"):
        train_flow(args.work_dir / "flow.safetensors", student, targets, args.flow_steps, 3e-3)
    if args.only in (None, "own", "refine"):
        own = ask_along(args.work_dir / "own.safetensors", flow, student, args.trajectories)
    if args.only in (None, "refine"):
        train_flow(args.work_dir / "refine.safetensors", student, both(targets, own), args.refine_steps, 2e-3)
    if args.only is None:
        assemble(student, vae, teacher.vae.config.scaling_factor).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
