"""Evaluates a run: held-out prompts and fixed seeds, drawn by the averaged weights at settings of its own."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora.adapters import lora
from ngrpo_lora.errors import SharedError, UserError
from ngrpo_lora.records.metrics import save_scores
from ngrpo_lora.reports.grids import NUM_SHOWN, clip, save_grid, save_shown
from ngrpo_lora.sampling.sampler import draw
from ngrpo_lora.training.measuring import measure
from ngrpo_lora.training.metering import Stages
from ngrpo_lora.training.rewarding import (
    check_finite,
    mean_of_frames,
    middle_frames,
    samples,
    scored_frames,
    too_many_failed,
    weighted_mean,
)
from ngrpo_lora.training.run import Run
from ngrpo_lora.types import Metrics, are_finite

log = logging.getLogger(__name__)


def evaluate(run: Run) -> Metrics:
    """Draw and score the held-out prompts; leaves every single score and a picture grid in the output folder.

    Raises:
        UserError: too many scores of the base model failed, or a measure did; of a trained one that is only logged, for
            it is worth more. Or the weights draw no pictures.
    """
    stages = Stages()
    with stages("evaluation"):
        own = run.processes.share(len(run.held_out))
        images = draw_held_out(run, own)
        scores = score_held_out(run, own, images)
        if failed := too_many_failed(run, scores):
            if run.iteration == 0:
                raise SharedError(f"evaluation of the base model: {failed}")
            log.warning("evaluation at iteration %d: %s", run.iteration, failed)
        leave_records(run, own, images, scores)
        means = {label: raw.nanmean().item() for label, raw in scores.items()}
        metrics = {f"eval/{label}_mean": mean for label, mean in means.items()}
        metrics["eval/reward_mean"] = weighted_mean(run, means)
        metrics |= measure(run, images)
        if (strict := run.config.strict_reward) is not None:
            metrics["eval/strict_accuracy"] = means[strict.key]
    return metrics | stages.metrics


def held_out_seeds(run: Run) -> list[int]:
    """The seed of each held-out prompt's picture."""
    return [run.config.evaluation.seed + i for i in range(len(run.held_out))]


def draw_held_out(run: Run, own: range) -> list[Image.Image]:
    """The pictures of this process's held-out prompts, of a video `num_frames` each.

    Raises:
        SharedError: too many latents, of all processes, are not finite.
    """
    drawn = [*own]
    if run.base_is_sharded:  # as many forward passes on every process
        drawn += [own.start] * (max(map(len, run.processes.shares(len(run.held_out)))) - len(own))
    seeds, solver, sigmas = held_out_seeds(run), run.config.evaluation_solver, run.evaluation_schedule.sigmas

    def pictures(size: int) -> tuple[list[Image.Image], Tensor]:
        finite = [torch.ones(0, dtype=torch.bool)]

        def see(latents: Tensor) -> None:
            finite.append(are_finite(latents.flatten(1)).cpu())

        images = draw(run.family, text, [seeds[i] for i in drawn], solver, sigmas, batch_size=size, see=see)
        return images, torch.cat(finite)

    with run.counter.paused(), lora.swapped(run.family.transformer, run.lora_step.averaged):
        text = run.family.encode([run.held_out[i] for i in drawn])
        images, finite = run.micro_batches.evaluation.fit(pictures)
    everywhere = torch.cat(run.processes.gather(finite[: len(own)]))
    check_finite(run, everywhere, f"evaluation at iteration {run.iteration}")
    return images[: len(own) * run.family.num_frames]


def score_held_out(run: Run, own: range, images: list[Image.Image]) -> dict[str, Tensor]:
    """Scores (N,) of all held-out pictures by every reward, trained on or watched; this process has drawn its own.

    Raises:
        UserError: a reward is none.
    """
    # Each picture is a group of its own.
    drawn = replace(samples(run, [run.held_out[i] for i in own], images), group_size=scored_frames(run))
    scores, problem = {}, None
    try:
        pending = [scorer.submit(drawn, run.score_cache) for scorer in (run.scorer, run.watching)]
        found = {label: raw for wait in pending for label, raw in wait(run.watchers.before_pass).items()}
        scores = {label: mean_of_frames(run, raw) for label, raw in found.items()}
    except UserError as error:
        problem = str(error)
    if problem := run.processes.agree(problem):
        raise SharedError(problem)
    shares = run.processes.gather(scores)
    return {label: torch.cat([share[label] for share in shares]) for label in scores}


def leave_records(run: Run, own: range, images: list[Image.Image], scores: dict[str, Tensor]) -> None:
    """Write the evaluation's scores, its grid, and the pictures that the report shows."""
    count, stem = run.config.evaluation.num_samples, f"{run.iteration:06d}"
    sent = middle_frames(run, images)[: max(0, min(len(own), count - own.start))]
    shown = [image for share in run.processes.gather(sent) for image in share]
    clips = [made for share in run.processes.gather(own_clips(run, own, images)) for made in share]
    if run.processes.is_main:
        texts, seeds = [prompt.text for prompt in run.held_out], held_out_seeds(run)
        pictures = [prompt.pictures for prompt in run.held_out]
        folder = run.output_dir / "samples"
        save_grid(folder / f"{stem}.png", shown, texts[: len(shown)])
        part = folder / ("last" if run.iteration else "first")
        save_shown(part, shown, texts, seeds, pictures)
        for index, made in enumerate(clips):  # each beside its middle frame
            (part / f"{index}.webp").write_bytes(made)
        if run.family.edits:
            size = run.config.model.width_px, run.config.model.height_px
            sources = [prompt.shown(size)["source"] for prompt in run.held_out[: min(len(shown), NUM_SHOWN)]]
            save_shown(folder / "sources", sources, texts, seeds, pictures)
        save_scores(run.output_dir / "evaluations" / f"{stem}.jsonl", texts, seeds, scores, pictures)


def own_clips(run: Run, own: range, images: list[Image.Image]) -> list[bytes]:
    """The clips of this process's held-out prompts that the report shows; none of pictures."""
    total, count = run.family.num_frames, min(NUM_SHOWN, run.config.evaluation.num_samples)
    first = range(max(0, min(len(own), count - own.start))) if total > 1 else range(0)
    return [clip(images[index * total : (index + 1) * total]) for index in first]
