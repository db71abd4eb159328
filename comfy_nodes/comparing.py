"""Adapters and strengths side by side on the same seeds, with scores."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ngrpo_lora.adapters.finding import adapter_label
from ngrpo_lora.config import RewardConfig
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.contest import Contest, check_prompt, check_source
from ngrpo_lora.evaluation.ranking import Ranking, check_samples, rank
from ngrpo_lora.sampling.strengths import parse_schedule

from ._api import Node, check_given, checked, schema, to_images, to_pictures
from .adapters import adapter_path, check_readable, fingerprint, lora_input
from .fitting import read_fitting
from .rewards import Entries, Rewards
from .schedules import apply
from .scoring import loaded, samples_of, scores_of
from .sources import check_reaches, only_source


class Column(NamedTuple):
    """What a column of pictures is drawn with; without a file it is the base."""

    file: str = ""
    """By its name in the loras folders."""
    strength: float = 0.0
    schedule: str = ""
    """Factors of the strength over the steps, as `parse_schedule` reads them."""

    def caption(self, label: str) -> str:
        """What is said below its pictures, where `label` stands for the file."""
        named = label if self.strength == 1 else f"{label} x {self.strength:.12g}"
        return f"{named}, {self.schedule}" if self.schedule else named


Choice = tuple[Column, ...]
"""Value of NGRPO_ADAPTERS."""

Adapters = io.Custom("NGRPO_ADAPTERS")


def parse_strengths(text: str) -> list[float]:
    """Read strengths with commas between them, as in `0.5, 1`.

    Raises:
        ConfigError: there is none, or one that is no finite number.
    """
    try:
        strengths = [float(part) + 0.0 for part in text.split(",")]  # -0 is 0
    except ValueError:
        strengths = [math.nan]
    if not all(map(math.isfinite, strengths)):
        raise ConfigError(f"strengths must be finite numbers with commas between, as in 0.5, 1, got {text!r}")
    return strengths


class AdapterList(Node):
    """Node that lists adapters, each at one or several strengths, for Compare."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "AdapterList",
            display_name="Adapter List",
            description="A LoRA file at one strength or several, for Compare: a column of pictures for each. Chain "
            "these nodes to compare several files.",
            search_aliases=["lora", "lora list", "lora stack", "strengths", "xy plot"],
            inputs=[
                lora_input(),
                io.String.Input("strengths", default="1", tooltip="One number, or several with commas: 0.5, 1, 1.5"),
                Adapters.Input("adapters", optional=True, tooltip="Further adapters; these are added after them."),
                io.String.Input(
                    "schedule",
                    default="",
                    optional=True,
                    tooltip="Factors of the strength over the steps, as Load Adapter has them: 0:1, 0.5:1, 0.5:0 is "
                    "the first half alone. Empty: 1.",
                ),
            ],
            outputs=[Adapters.Output(display_name="adapters")],
        )

    @classmethod
    def validate_inputs(
        cls, lora_name: str | None = None, strengths: str | None = None, schedule: str | None = ""
    ) -> bool:
        return (
            checked(check_readable, lora_name)
            and checked(parse_strengths, strengths)
            and checked(parse_schedule, schedule)
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **others: Any) -> tuple[int, ...]:
        return fingerprint(lora_name)

    @classmethod
    def execute(cls, lora_name: str, strengths: str, adapters: Choice = (), schedule: str = "") -> io.NodeOutput:
        check_given("adapters", adapters, Column, "Adapter List")
        parse_schedule(schedule)
        schedule = schedule.strip()
        return io.NodeOutput((*adapters, *(Column(lora_name, one, schedule) for one in parse_strengths(strengths))))


def columns_of(adapters: Choice, base_too: bool) -> dict[str, Column]:
    """Columns by the caption of their pictures, each once; where captions would be alike, later ones have a number.

    No adapter has the caption of the base, which a file of that name would have.
    """
    labels = {column.file: adapter_label(adapter_path(column.file)) for column in adapters}
    if len({*labels.values()}) < len(labels):  # of one name in several folders
        labels = {name: name.rpartition(".")[0] for name in labels}
    found: dict[str, Column] = {"base": Column()}
    for column in dict.fromkeys(adapters):
        label, number = labels[column.file], 2
        while (caption := column.caption(label)) in found:
            label, number = f"{labels[column.file]}-{number}", number + 1
        found[caption] = column
    if not base_too:
        del found["base"]
    return found


class Drawer:
    """Draws one latent after the other with ComfyUI's own sampling, under one progress bar for all."""

    def __init__(
        self,
        conditions: dict[str, Any],
        cfg: float,
        sampler: comfy.samplers.Sampler,
        sigmas: Tensor,
        latent: dict[str, Any],
        bar: comfy.utils.ProgressBar,
    ):
        self.conditions, self.cfg, self.sampler, self.sigmas = conditions, cfg, sampler, sigmas
        self.latent, self.bar, self.done = latent, bar, 0

    def __call__(self, model: ModelPatcher, seed: int) -> Tensor:
        """Draw the latents (1, ...) of a seed with a MODEL."""
        start = comfy.sample.fix_empty_latent_channels(model, self.latent["samples"][:1])
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds(self.conditions)
        guider.set_cfg(self.cfg)
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

        def step(number: int, clean: Tensor, latents: Tensor, steps: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.done += 1
            self.bar.update_absolute(
                self.done, preview=previewer and previewer.decode_latent_to_preview_image("JPEG", clean)
            )

        noise = gaussian_noise(start.shape, seed)
        drawn = guider.sample(
            noise, start, self.sampler, self.sigmas, self.latent.get("noise_mask"), step, disable_pbar=True, seed=seed
        )
        return drawn.to(comfy.model_management.intermediate_device())


def decode(vae: Any, latents: Tensor) -> Image.Image:
    """Decode latents (1, ...) to one picture, of a video its middle frame."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    frames = vae.decode(latents)  # (1, H, W, C), of a video (1, F, H, W, C)
    frames = frames.reshape(-1, *frames.shape[-3:])
    (picture,) = to_pictures(frames[len(frames) // 2][None])
    return picture


def judge(
    pictures: list[Image.Image], rewards: Entries | None, prompt: str, source: Tensor | None = None
) -> Ranking | None:
    """Rank pictures, of edits beside their source, by their rewards; None where there are no rewards."""
    if not rewards:
        return None
    samples = samples_of(pictures, " ".join(prompt.split()), "", source)
    scorer = loaded(rewards)
    check_samples(scorer, samples)
    return rank(scorer, scores_of(scorer, samples), "standardized")


class Compare(Node):
    """Node that draws the same seeds with base and adapters, as a captioned grid."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Compare",
            display_name="Compare Adapters",
            description="Draws the same seeds with the base and with each adapter and strength, and puts the pictures "
            "side by side: a row for each seed, a column for each adapter, scores below, the best of a row framed.",
            search_aliases=["a/b", "grid", "lora", "side by side", "xy plot"],
            advanced=["cell_px"],
            inputs=[
                io.Model.Input("model", tooltip="The base, or what all columns have in common."),
                io.Conditioning.Input("positive", tooltip="The prompt, with guidance where the model has it built in."),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                io.Sampler.Input("sampler", tooltip="Load Adapter and Flow DPM++ Sampler give the trainer's."),
                io.Sigmas.Input("sigmas", tooltip="Noise levels; Load Adapter and Flow Sigmas give the trainer's."),
                io.Latent.Input("latent_image", tooltip="An empty latent says the size; only its first row is drawn."),
                io.Int.Input(
                    "noise_seed", default=0, min=0, max=2**63 - 1, control_after_generate=True, tooltip="The first row."
                ),
                io.Int.Input(
                    "num_seeds", default=1, min=1, max=64, tooltip="Rows: this many seeds, each one more than the last."
                ),
                io.Boolean.Input("base_too", default=True, tooltip="The first column is MODEL without an adapter."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance by two passes, which needs negative; 1: one pass.",
                ),
                io.String.Input(
                    "prompt", default="", multiline=True, tooltip="The prompt again, for rewards that compare with it."
                ),
                io.Int.Input("cell_px", default=256, min=96, max=2048, tooltip="Width of a picture in the grid."),
                io.Conditioning.Input("negative", optional=True, tooltip="For cfg above 1."),
                Adapters.Input("adapters", optional=True, tooltip="From Adapter List: the columns."),
                Rewards.Input("rewards", optional=True, tooltip="What the pictures are judged by."),
                io.Image.Input(
                    "source",
                    optional=True,
                    tooltip="Of a model that edits, the picture that positive has from ReferenceLatent or the model's "
                    "own node: it stands first in every row, and rewards of edits see it.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="One captioned picture of all."),
                io.Image.Output(display_name="pictures", tooltip="All pictures, row by row."),
                io.String.Output(display_name="table", tooltip="All scores, means, and differences with intervals."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Any,
        vae: Any,
        sampler: comfy.samplers.Sampler,
        sigmas: Tensor,
        latent_image: dict[str, Any],
        noise_seed: int,
        num_seeds: int,
        base_too: bool,
        cfg: float,
        prompt: str,
        cell_px: int,
        negative: Any = None,
        adapters: Choice = (),
        rewards: Entries | None = None,
        source: Tensor | None = None,
    ) -> io.NodeOutput:
        check_given("adapters", adapters, Column, "Adapter List")
        check_given("rewards", rewards or (), RewardConfig, "a reward node")
        check_prompt(rewards or (), prompt)
        check_source(rewards or (), source is not None)
        edited = only_source(source)
        if edited is not None:
            check_reaches(positive, latent_image["samples"])
        if cfg != 1 and negative is None:
            raise ConfigError(f"cfg must be 1 without negative, got {cfg:g}; connect a negative prompt")
        columns = columns_of(adapters, base_too or not adapters)
        names = dict.fromkeys(column.file for column in adapters)
        fitting = {name: read_fitting(model, adapter_path(name)) for name in names}  # before the first is drawn
        seeds = range(noise_seed, noise_seed + num_seeds)
        conditions = {"positive": positive} | ({} if negative is None else {"negative": negative})
        steps = (len(sigmas) - 1) * len(columns) * num_seeds
        bar = comfy.utils.ProgressBar(steps, node_id=cls.hidden.unique_id)
        draw = Drawer(conditions, cfg, sampler, sigmas, latent_image, bar)
        drawn: list[list[Tensor]] = []
        for name, strength, schedule in columns.values():  # the weights are changed once for each
            patched = apply(model, fitting[name], strength, parse_schedule(schedule)) if name else model
            drawn.append([draw(patched, seed) for seed in seeds])
        pictures = [decode(vae, latents) for row in zip(*drawn, strict=True) for latents in row]
        before = None if edited is None else edited.fitted(*pictures[0].size)
        contest = Contest([*columns], seeds, pictures, judge(pictures, rewards, prompt, source), before)
        table = contest.table()
        grid = to_images([contest.grid(cell_px)])
        shown = ui.PreviewImage(grid, cls=cls).as_dict() | {"text": (table,)}
        return io.NodeOutput(grid, to_images(pictures), table, ui=shown)


NODES: list[type[io.ComfyNode]] = [AdapterList, Compare]
