"""Scores the images of an iteration, masks what has no score, and says what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora.equations.advantages import batch_deviation, reward_spread
from ngrpo_lora.errors import SharedError, UserError
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.scoring.combining import combine, correlations
from ngrpo_lora.scoring.scorer import Wait
from ngrpo_lora.training.lora_step import advice
from ngrpo_lora.training.run import Run
from ngrpo_lora.types import Metrics, RewardBatch, Rollout, Samples


def submit(run: Run, prompt: Prompt, images: list[Image.Image]) -> Wait:
    """Start to score the candidates of one prompt; the returned function waits for the scores."""
    return run.scorer.submit(samples(run, [prompt] * (len(images) // run.family.num_frames), images))


def samples(run: Run, prompts: Sequence[Prompt], images: list[Image.Image]) -> Samples:
    """What rewards see of one sample a prompt: its image, or some frames of its video, evenly spaced, beside all."""
    count, total = scored_frames(run), run.family.num_frames
    chosen = [(2 * i + 1) * total // (2 * count) for i in range(count)]
    videos = [images[start : start + total] for start in range(0, len(images), total)]
    shown = [video[i] for video in videos for i in chosen]
    size = run.config.model.width_px, run.config.model.height_px
    metadata = {id(prompt): prompt.shown(size) for prompt in prompts}  # a group's prompt is one object
    repeated = [prompt for prompt in prompts for _ in chosen]
    texts, rows = [prompt.text for prompt in repeated], [metadata[id(prompt)] for prompt in repeated]
    return Samples(shown, texts, rows, len(shown), [video for video in videos for _ in chosen] if total > 1 else ())


def scored_frames(run: Run) -> int:
    """How many pictures of each sample are scored: one, or `rewards.frames` of a video."""
    return min(run.config.rewards.frames, run.family.num_frames)


def middle_frames(run: Run, images: list[Image.Image]) -> list[Image.Image]:
    """One picture of each sample: the image, or the middle frame of the video."""
    return images[run.family.num_frames // 2 :: run.family.num_frames]


def collect(run: Run, rollouts: list[Rollout], pending: list[Wait]) -> RewardBatch:
    """Scores of all processes' P groups as one batch; a sample whose latents are not finite has none.

    Raises:
        UserError: a reward is none, or failed for more than `rewards.max_failed_share`, or so many latents are not
            finite.
    """
    finite = torch.stack([rollout.finite for rollout in rollouts])  # (P, G)
    scores, problem = {}, None
    try:
        groups = [wait(partial(while_waiting, run)) for wait in pending]
        own = {label: torch.stack([mean_of_frames(run, group[label]) for group in groups]) for label in groups[0]}
        scores = {label: raw.where(finite, torch.nan) for label, raw in own.items()}
    except SharedError:
        raise
    except UserError as error:
        problem = str(error)
    check_finite(run, torch.cat(run.processes.gather(finite)), f"iteration {run.iteration + 1}")
    problem = run.processes.agree(problem)
    if problem is None:
        shares = run.processes.gather(scores)
        scores = {label: torch.cat([share[label] for share in shares]) for label in scores}
        problem = too_many_failed(run, scores)
    if problem is not None:
        raise SharedError(f"iteration {run.iteration + 1}: {problem}, then go on with resume=latest")
    return combine(scores, run.config.rewards.train, run.config.rewards.combine)


def while_waiting(run: Run) -> None:
    """Let watchers look; a run that waits for people, who may never come, ends at once when it is asked to.

    Raises:
        SharedError: it was asked to.
    """
    run.watchers.before_pass()
    if run.config.rewards.asks_people and run.asked.stop:
        raise SharedError(
            f"stopped in iteration {run.iteration + 1} of {run.config.trainer.num_iterations}, while people were asked "
            "for scores; all that they have said is kept; go on with resume=latest"
        )


def mean_of_frames(run: Run, scores: Tensor) -> Tensor:
    """Scores of pictures -> scores of samples, (N * frames,) -> (N,)."""
    return scores.view(-1, scored_frames(run)).mean(1)


def check_finite(run: Run, finite: Tensor, when: str) -> None:
    """End a run whose weights draw no pictures; rewards have no part in this, and are not blamed.

    Args:
        finite: bool, whether each sample of all processes has finite latents.
    Raises:
        SharedError: more than `rewards.max_failed_share` of them have not; the checkpoint that is then written is of
            the weights that have last drawn pictures.
    """
    share = 1 - finite.double().mean().item()
    if share <= run.config.rewards.max_failed_share and share < 1:
        return
    what = f"{when}: the latents of {share:.0%} of the samples are not finite"
    if run.sound is None:
        how = "no update made them so" if run.iteration == 0 else "the checkpoint draws none that are"
        raise SharedError(
            f"{what}, and {how}; start anew in another output_dir with another model.dtype, lora.init_from or lower "
            f"optimizer.learning_rate ({run.config.optimizer.learning_rate:g})"
        )
    run.kept = run.sound
    raise SharedError(f"{what}, as updates were too large; {advice(run.config.optimizer.learning_rate)}")


def too_many_failed(run: Run, scores: dict[str, Tensor]) -> str | None:
    """What is wrong where more scores failed than `rewards.max_failed_share` allows, or all of them.

    What people did not say has not failed.
    """
    limit = run.config.rewards.max_failed_share
    people = asked_of_people(run)
    for label, raw in scores.items():
        if label in people:
            continue
        share = (~raw.isfinite()).double().mean().item()
        if share == 1:
            return f"reward {label} has no score for any image; reasons are above; correct it, or what it is given"
        if share > limit:
            return (
                f"reward {label} has no score for {share:.0%} of the images, more than rewards.max_failed_share "
                f"({limit:g}) allows; reasons are above; fix it or raise the limit"
            )
    return None


def asked_of_people(run: Run) -> set[str]:
    """The labels of trained rewards that people are asked for."""
    return {config.key for config in run.config.rewards.train if config.asks_people}


def weighted_mean(run: Run, means: dict[str, float]) -> float:
    """The weighted sum of the raw means of all trained rewards, which the curve shows."""
    return float(sum(config.weight * means[config.key] for config in run.config.rewards.train))


def describe(run: Run, batch: RewardBatch) -> Metrics:
    """Reward statistics over all valid samples; a group of equal rewards has zero spread."""
    spread = reward_spread(batch.rewards, batch.valid)
    means = {label: scores.nanmean().item() for label, scores in batch.scores.items()}
    raw = {f"rollout/{label}_mean": mean for label, mean in means.items()}
    if len(means) > 1:
        for label, scores in batch.scores.items():
            raw[f"rollout/{label}_failed_share"] = (~scores.isfinite()).double().mean().item()
        raw |= {f"rollout/correlation/{pair}": value for pair, value in correlations(batch.scores).items()}
    failed = torch.zeros_like(batch.valid)
    for label, scores in batch.scores.items():
        if label not in asked_of_people(run):
            failed |= ~scores.isfinite()
        else:
            raw[f"rollout/{label}_unsaid_share"] = (~scores.isfinite()).double().mean().item()
    raw |= {f"rollout/{name}": value for name, value in run.scorer.metrics().items()}
    return raw | {
        "rollout/reward_mean": weighted_mean(run, means),
        "rollout/reward_std": batch_deviation(batch.rewards, batch.valid),
        "rollout/zero_spread_share": (spread <= 0).double().mean().item(),
        "rollout/failed_share": failed.double().mean().item(),
    }
