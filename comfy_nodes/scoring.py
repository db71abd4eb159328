"""Pictures judged by rewards in the graph: sorted, the best of them, every score."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ngrpo_lora.config import RewardConfig, parse_settings
from ngrpo_lora.config.words import settled
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.contest import check_source
from ngrpo_lora.evaluation.ranking import check_samples, each_its_own, rank
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.scoring.scorer import Scorer
from ngrpo_lora.types import Samples

from ._api import (
    Node,
    cancellable,
    check_given,
    checked,
    filled_lines,
    listed,
    make_room,
    schema,
    to_images,
    to_pictures,
)
from .rewards import Chosen, Entries, Rewards
from .sources import with_sources

COMBINED = ["standardized", "raw"]


class Score(Node):
    """Node that scores pictures and sorts them, best first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Score",
            display_name="Score Images",
            description="Judges a batch of pictures, sorts it and keeps the best. A reward that fails for a picture "
            "gives it no score: it comes last, and the reason is said.",
            search_aliases=["aesthetic", "best of n", "pick best", "rank", "reward", "sort images"],
            advanced=["metadata"],
            inputs=[
                io.Image.Input("images", tooltip="The pictures; a batch of at least two to have a choice."),
                Rewards.Input("rewards", tooltip="What they are judged by."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What the pictures should show: one line for all, or one line for each.",
                ),
                io.Int.Input("n", default=1, min=1, max=4096, tooltip="How many pictures `best` keeps."),
                io.Combo.Input(
                    "combine",
                    options=COMBINED,
                    default=COMBINED[0],
                    tooltip="Several rewards, before they are weighted and added up: brought to mean 0 and deviation 1 "
                    "over this batch, or as they are. One reward is always as it is.",
                ),
                io.String.Input(
                    "metadata",
                    default="",
                    multiline=True,
                    tooltip="What some rewards want to know beside the prompt (geneval: include; ocr: text): a YAML or "
                    "JSON mapping in one line for all pictures, or one line for each.",
                ),
                io.Int.Input(
                    "sheet_px", default=256, min=64, max=2048, tooltip="Width of a picture on the contact sheet."
                ),
                io.Image.Input(
                    "source",
                    optional=True,
                    tooltip="For rewards of edits: what the pictures were edited from, one for all or one for each.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sorted", tooltip="All pictures, best first."),
                io.Image.Output(display_name="best", tooltip="The n best."),
                io.String.Output(display_name="table", tooltip="Every score of every picture, best first."),
                io.Float.Output(display_name="best score", tooltip="Of the best picture, the weighted sum."),
                io.Float.Output(display_name="mean score", tooltip="Of all pictures that have one."),
                io.Image.Output(display_name="sheet", tooltip="One picture of all, best first, with their scores."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, combine: str = COMBINED[0]) -> bool:
        return checked(listed, "combine", combine, COMBINED)

    @classmethod
    def execute(
        cls,
        images: Tensor,
        rewards: Entries,
        prompt: str,
        n: int,
        combine: Literal["standardized", "raw"],
        metadata: str,
        sheet_px: int,
        source: Tensor | None = None,
    ) -> io.NodeOutput:
        samples = samples_of(to_pictures(images), prompt, metadata, source)
        listed("combine", combine, COMBINED)
        check_given("rewards", rewards, RewardConfig, "a reward node")
        check_source(rewards, source is not None)
        scorer = loaded(rewards)
        check_samples(scorer, samples)
        ranking = rank(scorer, scores_of(scorer, samples), combine)
        table = ranking.table()
        sheet = to_images([ranking.sheet(samples.images, samples.prompts, 4, sheet_px)])
        ordered = images[ranking.order]
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | {"text": (table,)}
        return io.NodeOutput(ordered, ordered[:n], table, ranking.best, ranking.mean, sheet, ui=shown)


def samples_of(pictures: Sequence[Image.Image], prompt: str, metadata: str, source: Tensor | None = None) -> Samples:
    """Make samples of pictures, with their prompts and metadata read from text, and the sources of edits.

    Raises:
        ConfigError: there is neither one line or source nor one for each picture, or metadata is no mapping.
    """
    lines = filled_lines(prompt) or [""]
    prompts = each_its_own(lines, len(pictures), "prompt")
    mappings = [*map(mapping_of, filled_lines(metadata))] or [{}]
    rows = each_its_own(mappings, len(pictures), "metadata")
    edited = with_sources([*map(Prompt, prompts, rows)], source)
    group_size = len(pictures) if len({prompt.condition for prompt in edited}) == 1 else 1
    shown = [prompt.shown(picture.size) for prompt, picture in zip(edited, pictures, strict=True)]
    return Samples(pictures, prompts, shown, group_size)


def mapping_of(line: str) -> dict[str, Any]:
    """Read the metadata of a picture.

    Raises:
        ConfigError: it is no mapping, or holds a word such as `yes`, which may be a truth value or text.
    """
    try:
        found = parse_settings(line)
    except ConfigError as error:
        raise ConfigError(str(error).replace("settings must be lines", "metadata must be lines", 1)) from None
    try:
        return settled(found)
    except ValueError as error:
        raise ConfigError(f"metadata {error}") from None


def loaded(rewards: Entries) -> Scorer:
    """Load a chain's rewards; where they find no room beside ComfyUI's models, once more without those."""
    check_given("rewards", rewards, RewardConfig, "a reward node")
    chosen = rewards if isinstance(rewards, Chosen) else Chosen(rewards)
    with suppress(torch.OutOfMemoryError):
        return cancellable(chosen.load)
    make_room(comfy.model_management.get_torch_device())
    return cancellable(chosen.load)


def scores_of(scorer: Scorer, samples: Samples) -> dict[str, Tensor]:
    """Scores (N,) by reward; where a network found no room beside ComfyUI's models, once more without those."""
    scores = cancellable(scorer, samples)
    if any("OutOfMemoryError" in reason for reward in scorer.rewards.values() for reason in reward.failures):
        make_room(comfy.model_management.get_torch_device())
        scores = cancellable(scorer, samples)
    return scores


NODES: list[type[io.ComfyNode]] = [Score]
