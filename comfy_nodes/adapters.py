"""LoRA files of any trainer on a MODEL, with their own sampler and noise levels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.samplers import KSAMPLER
from comfy_api.latest import io, ui

from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.adapters.report import describe, lines
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.sampling.recommended import Recommendation, recommend
from ngrpo_lora.sampling.strengths import parse_schedule

from ._api import Node, checked, listed, schema, state_of
from .fitting import ALPHA, family_of, read_fitting
from .sampling import sample_flow, weightless
from .schedules import apply

FOLDER = "loras"


def lora_input() -> io.Combo.Input:
    """Make the input that chooses among all LoRA files."""
    files = folder_paths.get_filename_list(FOLDER)
    return io.Combo.Input("lora_name", options=files, tooltip="A file in the loras folder.")


def adapter_path(name: str) -> Path:
    """Path of a file in ComfyUI's loras folders, by its name there.

    Raises:
        ConfigError: there is none, or the name leaves the folders.
    """
    path = folder_paths.get_full_path(FOLDER, name) if name in folder_paths.get_filename_list(FOLDER) else None
    if path is None:
        raise ConfigError(f"lora_name must be a file in ComfyUI's loras folder, got {name!r}; refresh the list with R")
    return Path(path)


def check_readable(name: str) -> None:
    """Raise UserError where a LoRA file is not in ComfyUI's loras folders, or is no safetensors file."""
    read_metadata(adapter_path(name))


def fingerprint(name: str | None) -> tuple[int, ...]:
    """Time and size of a LoRA file, by which a change shows; empty for None, a name that another node gives later."""
    return () if name is None else state_of(adapter_path(name))


def check_strength(strength: float) -> None:
    """Raise ConfigError for a strength that is not finite."""
    if not math.isfinite(strength):
        raise ConfigError(f"strength must be finite, got {strength}; 1 is as trained, 0 the base")


def report(name: str, path: Path, model: ModelPatcher, recommendation: Recommendation) -> str:
    """Report what `ngrpo info` says of a file, and the settings with which it is drawn here."""
    rows = dict(lines(describe(path, family_of(model)))) | {"file": name}
    rows.pop("draw")
    info = recommendation.info
    rows["settings"] = f"{rows['settings']} ({recommendation.source})" if "settings" in rows else recommendation.source
    rows["drawn with"] = (
        f"{info.rollout.num_steps} steps of {info.rollout.solver}, {info.model.width_px} x {info.model.height_px} px"
    )
    if note := built_in_guidance(model, recommendation):
        rows["note"] = note
    return "\n".join(f"{what}: {value}" for what, value in rows.items())


def built_in_guidance(model: ModelPatcher, recommendation: Recommendation) -> str | None:
    """A note where built-in guidance shows that a MODEL is of another base, else None; weights do not name a base."""
    own = weightless(recommendation.base, 64, 64).transformer.config.get("guidance_embeds")
    here = model.model.model_config.unet_config.get("guidance_embed")
    if own is None or here is None or own == here:
        return None
    has, lacks = ("with", "none") if own else ("without", "some")
    return (
        f"trained {has} guidance built in ({recommendation.info.model.path}), and this MODEL has {lacks}: it is of "
        "another base, and draws differently"
    )


class LoadAdapter(Node):
    """Node that puts a LoRA on a MODEL, with the sampler and noise levels of its training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadAdapter",
            display_name="Load Adapter",
            description="A LoRA on a MODEL, with the sampler, the noise levels, the guidance and the size that it was "
            "trained with. Reads files of any trainer (diffusers, PEFT, kohya, ComfyUI); one that does not fit the "
            "MODEL in every layer is an error. Several in a row add up.",
            search_aliases=["lora", "lora loader", "load lora", "peft", "kohya", "strength schedule"],
            has_intermediate_output=True,
            advanced=["alpha"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX, SD3, Qwen-Image, Z-Image, Wan, or the embedded model."),
                lora_input(),
                io.Float.Input(
                    "strength", default=1.0, min=-20.0, max=20.0, step=0.05, tooltip="1: as trained; 0: the base."
                ),
                io.String.Input(
                    "schedule",
                    default="",
                    tooltip="Factors of the strength over the steps, as place:factor from 0, the first step, to 1, the "
                    "last, with straight lines between: 0:0, 0.3:1, 1:0.5. A place given twice is a jump. Empty: 1.",
                ),
                io.Combo.Input(
                    "alpha",
                    options=ALPHA,
                    default=ALPHA[0],
                    tooltip="alpha that stands in the header alone: ComfyUI's own loaders do not see it, and draw with "
                    "another strength than diffusers. Fold in: as it was trained.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Sampler.Output(tooltip="The solver of training."),
                io.Sigmas.Output(tooltip="The noise levels of training."),
                io.Float.Output("guidance", display_name="guidance", tooltip="For FluxGuidance, or as cfg."),
                io.Int.Output("width", display_name="width", tooltip="Of training, in pixels."),
                io.Int.Output("height", display_name="height", tooltip="Of training, in pixels."),
                io.String.Output("info", display_name="info", tooltip="What the file says of itself."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        lora_name: str | None,
        strength: float | None = 1.0,
        schedule: str | None = "",
        alpha: str | None = ALPHA[0],
    ) -> bool:
        return (
            checked(check_readable, lora_name)
            and checked(listed, "alpha", alpha, ALPHA)
            and checked(check_strength, strength)
            and checked(parse_schedule, schedule)
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **others: Any) -> tuple[int, ...]:
        return fingerprint(lora_name)

    @classmethod
    def execute(cls, model: ModelPatcher, lora_name: str, strength: float, schedule: str, alpha: str) -> io.NodeOutput:
        path = adapter_path(lora_name)
        check_strength(strength)
        listed("alpha", alpha, ALPHA)
        adapter = read_fitting(model, path, alpha)
        recommendation = recommend(path, adapter.family)
        info = recommendation.info
        family = weightless(recommendation.base, info.model.height_px, info.model.width_px)
        sigmas = family.sigmas(info.rollout.num_steps, info.rollout.shift)
        guidance = info.model.guidance_scale
        text = report(lora_name, path, model, recommendation)
        return io.NodeOutput(
            apply(model, adapter, strength, parse_schedule(schedule)),
            KSAMPLER(sample_flow, {"solver": info.rollout.solver}),
            sigmas,
            float(family.settings["guidance_scale"] if guidance is None else guidance),
            info.model.width_px,
            info.model.height_px,
            text,
            ui=ui.PreviewText(text),
        )


NODES: list[type[io.ComfyNode]] = [LoadAdapter]
