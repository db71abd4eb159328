"""Draws the groups of an iteration under the old weights, and decodes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora.adapters import lora
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.seeds import derive_seed
from ngrpo_lora.training.run import Run
from ngrpo_lora.types import Rollout, TextEmbeds


def prompts_of(run: Run) -> list[Prompt]:
    """This process's prompts of this iteration, one a group; the source gives every iteration its own."""
    start = run.iteration * run.config.rollout.prompts_per_iteration
    return [run.prompts.prompt(start + group) for group in run.groups]


@torch.no_grad()
def roll_out(run: Run, text: TextEmbeds) -> Iterator[Rollout]:
    """This process's groups under the old weights, in turn; `rollout.micro_batch_size` samples a forward pass."""
    micro_batch = run.micro_batches.rollout
    at_once = max(1, micro_batch.size // run.config.rollout.group_size)  # groups that share their forward passes

    def velocity_fn(latents: Tensor, sigma: float) -> Tensor:
        groups, samples = latents.shape[:2]
        owners = torch.arange(first, first + groups).repeat_interleave(samples)

        def passes(size: int) -> Tensor:
            chunks = zip(latents.flatten(0, 1).split(size), owners.split(size), strict=True)
            return torch.cat([run.family.velocity(x, sigma, text[group.tolist()]) for x, group in chunks])

        return micro_batch.fit(passes).view(latents.shape)

    seeds = [derive_seed(run.config.seed, "rollout", run.iteration, group) for group in run.groups]
    with rollout_weights(run):
        for first in range(0, len(text), at_once):
            yield from run.algorithm.rollout(
                velocity_fn,
                run.schedule,
                run.family.latent_shape,
                seeds[first : first + at_once],
                run.iteration,
                run.family.device,
            )


def rollout_weights(run: Run) -> AbstractContextManager[None]:
    """The adapter beside the base, or with `rollout.merge_adapter` added into it."""
    return lora.merged(run.family.transformer) if run.config.rollout.merge_adapter else nullcontext()


def decode(run: Run, rollout: Rollout) -> list[Image.Image]:
    """The images of a rollout's G samples, of a video `num_frames` each; `rollout.micro_batch_size` at a time."""
    return run.micro_batches.rollout.fit(
        lambda size: [image for chunk in rollout.final.split(size) for image in run.family.decode(chunk)]
    )
