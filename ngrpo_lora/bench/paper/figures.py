"""The paper's figures from complete runs: curves (5), groups after training (8), methods side by side (9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.bench.paper.outcomes import Outcome
from ngrpo_lora.records.files import written
from ngrpo_lora.records.pictures import read_png_text
from ngrpo_lora.reports.curves import shown_pictures
from ngrpo_lora.reports.grids import save_grid

__all__ = ["draw_curves", "draw_groups", "draw_side_by_side"]

Labelled = Sequence[tuple[str, Sequence[Outcome]]]
"""The label of a method, and its runs, one a seed."""

GROUP_PROMPT, GROUP_SEED = "a red star and a blue heart", 2024


def draw_curves(path: Path, labelled: Labelled) -> None:
    """Plot the held-out reward over iterations, forward passes per sample and seconds: mean and range over seeds."""
    axes_of: list[tuple[str, Callable[[Outcome], dict[int, float]]]] = [
        ("iterations", lambda outcome: {step: float(step) for step in outcome.scores}),
        ("forward passes per sample, a trained one as three", Outcome.spent),
        ("seconds of training", Outcome.seconds),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.4), layout="constrained", sharey=True)
    markers, colors = "os^Dv<>pPX*h", plt.get_cmap("tab20").colors  # pyright: ignore
    for axis, (name, places) in zip(axes, axes_of, strict=True):
        for index, (label, outcomes) in enumerate(labelled):
            steps = sorted(set.intersection(*(set(outcome.scores) for outcome in outcomes)))
            rewards = np.array([[reward_at(outcome, step) for step in steps] for outcome in outcomes])  # (S, E)
            x = np.mean([[places(outcome)[step] for step in steps] for outcome in outcomes], 0)
            style: dict[str, Any] = {"color": colors[index % len(colors)]}
            axis.plot(x, rewards.mean(0), marker=markers[index % len(markers)], markersize=4, label=label, **style)
            if len(outcomes) > 1:
                axis.fill_between(x, rewards.min(0), rewards.max(0), alpha=0.15, linewidth=0, **style)
        axis.set(xlabel=name)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="held-out reward")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    with written(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def reward_at(outcome: Outcome, step: int) -> float:
    """The held-out reward of an evaluation."""
    value = next(row["eval/reward_mean"] for row in outcome.rows if row["step"] == step)
    return math.nan if value is None else value


def draw_side_by_side(path: Path, labelled: Labelled) -> None:
    """Draw the first held-out prompts with the same noises by every method, one row a prompt, the base first."""
    first = labelled[0][1][0]
    pictures = [("base model", shown_pictures(first.job.folder)["base"])]
    pictures += [(label, shown_pictures(outcomes[0].job.folder)["now"]) for label, outcomes in labelled]
    files = sorted((first.job.folder / "samples" / "last").glob("*.png"), key=lambda file: int(file.stem))
    prompts = [read_png_text(file)["prompt"] for file in files]
    cells = [(f"{label}\n{prompts[row]}", own[row]) for row in range(len(prompts)) for label, own in pictures]
    captions, images = zip(*cells, strict=True)
    save_grid(path, images, captions, columns=len(pictures), caption_lines=3)


@torch.no_grad()
def draw_groups(path: Path, labelled: Labelled) -> None:
    """Draw one neighbourhood of noises by the base model and by every trained one, one row a model.

    The noises are those of Eq. 7, at the radius of each method's training.
    """
    from ngrpo_lora.sampling.sampler import Sampler, solve
    from ngrpo_lora.sampling.settings import drawing_settings
    from ngrpo_lora.training.setup import open_algorithm

    captions: list[str] = []
    images: list[Image.Image] = []
    sampler, group = None, 0
    for label, outcomes in labelled:
        job = outcomes[0].job
        adapter, group = job.folder / "adapter" / FILE_NAME, job.config.rollout.group_size
        sampler = sampler or Sampler(drawing_settings(adapter, None, job.config.model.device))
        noise = open_algorithm(job.config).neighborhood(sampler.family.latent_shape, GROUP_SEED)  # pyright: ignore
        text = sampler.family.encode([GROUP_PROMPT])[[0] * group]
        for name, used in (("base model", []), (label, [(adapter, 1.0)]))[bool(images) :]:
            sampler.use(used)
            drawn = sampler.family.decode(solve(sampler.family, text, noise, sampler.solver, sampler.sigmas))
            images += drawn
            captions += [name, *[""] * (len(drawn) - 1)]
    save_grid(path, images, captions, columns=group, caption_lines=1)
