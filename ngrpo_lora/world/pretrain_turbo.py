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

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_model, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ngrpo_lora.adapters import lora
from ngrpo_lora.config import LoraConfig, ModelConfig
from ngrpo_lora.equations.solvers import dpmpp_2m, euler, flow_sigmas
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._loading import load_family
from ngrpo_lora.world import EMBEDDED_TURBO
from ngrpo_lora.world._parts import SHARES, SHIFT, TRAIN_SCENES, caption
from ngrpo_lora.world.distil import optimise
from ngrpo_lora.world.scenes import sample_scene

log = logging.getLogger(__name__)

STEPS, SUBSTEPS, BATCH = 4, 4, 32
SIGMAS = flow_sigmas(STEPS, SHIFT)
FINE = flow_sigmas(STEPS * SUBSTEPS, SHIFT)  # every fourth is one of SIGMAS


class Steps(NamedTuple):
    """Steps that the student is to make, N of each."""

    start: Tensor
    """(N, 16, 8, 8) float16."""
    step: Tensor
    """(N,) int64, 0 to 3."""
    velocity: Tensor
    """(N, 16, 8, 8) float16, the mean of the teacher's until the next of SIGMAS."""
    captions: list[str]
    """N of them."""


def drawn_captions(n: int, rng: np.random.Generator) -> list[str]:
    """Captions of random training scenes."""
    return [caption(sample_scene(rng, TRAIN_SCENES, SHARES), rng) for _ in range(n)]


@torch.no_grad()
def ask(path: Path, family: BaseFamily, trajectories: int, own: bool) -> Steps:
    """Where the teacher comes from the points of its own trajectories, or of the student's, which the adapter draws.

    The first are in one piece, so that their solver remembers the step before.
    """
    if not path.exists():
        rng, parts, captions = np.random.default_rng(21 + own), list[Steps](), list[str]()
        generator = torch.Generator().manual_seed(21 + own)
        for batch in range(trajectories // 100):
            texts = drawn_captions(100, rng)
            text = family.encode(texts)
            noise = torch.randn(100, *family.latent_shape, generator=generator)

            def velocity(latents: Tensor, sigma: float, text=text) -> Tensor:
                return family.velocity(latents, sigma, text)

            if own:
                starts = euler(velocity, noise, SIGMAS)[:-1]
                with lora.disabled(family.transformer):
                    ends = [
                        dpmpp_2m(velocity, start, FINE[step * SUBSTEPS : (step + 1) * SUBSTEPS + 1])[-1]
                        for step, start in enumerate(starts)
                    ]
            else:
                with lora.disabled(family.transformer):
                    points = dpmpp_2m(velocity, noise, FINE)[::SUBSTEPS]
                starts, ends = points[:-1], points[1:]
            for step, (start, end) in enumerate(zip(starts, ends, strict=True)):
                velocities = (end - start) / (SIGMAS[step + 1] - SIGMAS[step])
                parts.append(Steps(start.half(), torch.full((100,), step), velocities.half(), texts))
                captions += texts
            if batch % 20 == 19:
                log.info("%s %d/%d", path.stem, batch + 1, trajectories // 100)
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in Steps._fields[:3]}
        save_file(columns, path, {"captions": "\n".join(captions)})
    with safe_open(path, "pt") as file:
        return Steps(*map(file.get_tensor, Steps._fields[:3]), file.metadata()["captions"].split("\n"))


def both(one: Steps, other: Steps) -> Steps:
    """The steps of two kinds together."""
    tensors = (torch.cat(pair) for pair in zip(one[:3], other[:3], strict=True))
    return Steps(*tensors, one.captions + other.captions)


def train(path: Path, family: BaseFamily, known: Steps, steps: int, peak: float) -> None:
    """Train the adapter on these steps; leaves averaged weights in it."""
    adapter = torch.nn.ParameterList(lora.parameters(family.transformer).values())
    if not path.exists():
        texts = sorted(set(known.captions))
        text = family.encode(texts)
        places = {one: place for place, one in enumerate(texts)}
        told = torch.tensor([places[one] for one in known.captions])

        def loss_fn(step: int) -> Tensor:
            chosen = torch.randint(len(told), (BATCH,), generator=torch.Generator().manual_seed(step))
            sigma = SIGMAS[known.step[chosen]]
            velocity = family.velocity(known.start[chosen].float(), sigma, text[told[chosen].tolist()])
            return F.mse_loss(velocity, known.velocity[chosen].float())

        average = AveragedModel(adapter, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        optimise(adapter, steps, peak, path, loss_fn, average)
    load_model(adapter, path)


def save(folder: Path, family: BaseFamily) -> None:
    """Write the adapter in bfloat16, as diffusers writes LoRAs."""
    weights = {name: weight.bfloat16() for name, weight in get_peft_model_state_dict(family.transformer).items()}
    peft = family.transformer.peft_config[lora.ADAPTER_NAME].to_dict()
    FluxPipeline.save_lora_weights(folder, weights, transformer_lora_adapter_metadata=peft)


def main() -> None:
    """Run the stages that have not been run, then write the LoRA to `--output-dir`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/turbo"), help="where the stages leave files")
    parser.add_argument("--output-dir", type=Path, default=EMBEDDED_TURBO, help="the LoRA's folder")
    parser.add_argument("--trajectories", type=int, default=16_000, help="of either kind, a multiple of 100")
    parser.add_argument("--steps", type=int, default=5_000, help="of training, in either stage")
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.trajectories % 100 or min(args.trajectories, args.steps, args.rank) <= 0:
        parser.error(f"counts must be positive and --trajectories a multiple of 100, got {vars(args)}")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    family = load_family(ModelConfig(path="embedded", dtype="float32", device="cpu"))
    config = LoraConfig(rank=args.rank)
    lora.inject(family.transformer, config, *family.lora_targets(config.targets), seed=0)
    known = ask(args.work_dir / "trajectories.safetensors", family, args.trajectories, own=False)
    train(args.work_dir / "first.safetensors", family, known, args.steps, 2e-3)
    known = both(known, ask(args.work_dir / "own.safetensors", family, args.trajectories // 2, own=True))
    train(args.work_dir / "turbo.safetensors", family, known, args.steps, 1e-3)
    save(args.output_dir, family)


if __name__ == "__main__":
    main()
