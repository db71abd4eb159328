"""Draws pictures by several adapters side by side; every picture says in its PNG text how it was drawn."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from ngrpo_lora.adapters.contents import settled
from ngrpo_lora.adapters.finding import adapter_label
from ngrpo_lora.adapters.fusing import changed_files
from ngrpo_lora.adapters.header import AdapterInfo, code_version
from ngrpo_lora.adapters.matching import check_adapters
from ngrpo_lora.config import ModelConfig, RolloutConfig
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.prompts.files import Prompt, as_prompt
from ngrpo_lora.prompts.pictures import SourcePicture, read_source
from ngrpo_lora.records.files import digest
from ngrpo_lora.records.pictures import read_png_text
from ngrpo_lora.sampling.sampler import Sampler, draw


@dataclass(frozen=True)
class Column:
    """A column of pictures: the LoRA files that draw them together, with strengths; without any, the base draws."""

    label: str
    adapters: tuple[tuple[Path, float], ...] = ()


@dataclass(frozen=True)
class Drawing:
    """A drawn sample (of a video all frames), and the PNG text with which `--like` draws it again."""

    column: Column
    row: int
    prompt: str
    seed: int
    frames: list[Image.Image]
    text: dict[str, str]


def columns_of(adapters: Sequence[tuple[Path, float]], apart: bool, base_too: bool) -> list[Column]:
    """Make the columns: the base where it is wanted, then all adapters together, or with `apart` each by itself."""
    columns = [Column("base")] if base_too or not adapters else []
    groups = [(one,) for one in adapters] if apart else [tuple(adapters)] if adapters else []
    for group in groups:
        name = "+".join(adapter_label(path) + ("" if strength == 1 else f"x{strength:g}") for path, strength in group)
        label, number = name, 2
        while label in [column.label for column in columns]:
            label, number = f"{name}-{number}", number + 1
        columns.append(Column(label, group))
    return columns


def draw_columns(
    info: AdapterInfo,
    columns: Sequence[Column],
    prompts: Sequence[str | Prompt],
    seeds: Sequence[int],
    follow_sources: bool = False,
) -> Iterator[Drawing]:
    """Draw every prompt with every seed (prompt-major) by every column, each when it is asked for.

    Args:
        follow_sources: whether an edit is as large as suits its source, in place of the configured size.
    Raises:
        UserError: no such model, or a file that is no adapter, or fits no layer of the model.
    """
    check_adapters(info.model, [path for column in columns for path, _ in column.adapters])
    sampler = Sampler(info)
    for column in columns:  # an adapter that does not fit should be known before an hour of drawing
        sampler.use(column.adapters)
    digests = {path: digest(path) for column in columns for path, _ in column.adapters}
    fused = {"fused": sampler.family.fused}
    for number, prompt in enumerate(map(as_prompt, prompts)):
        sized = sampler.following(prompt) if follow_sources else sampler
        settings = shown_settings(sized.info, sized.family) | fused | {"source": described(prompt.source)}
        text = sized.family.encode([prompt])
        for seed in seeds:
            for column in columns:
                sized.use(column.adapters)
                frames = draw(sized.family, text, [seed], sized.solver, sized.sigmas)
                adapters = [
                    {"file": os.path.abspath(path), "sha256": digests[path], "strength": strength}
                    for path, strength in column.adapters
                ]
                own = {"ngrpo": json.dumps(settings | {"adapters": adapters}, sort_keys=True)}
                shown = {"prompt": prompt.text, "seed": str(seed)} | own
                yield Drawing(column, number, prompt.text, seed, frames, shown)


def described(source: SourcePicture | None) -> dict[str, str | None] | None:
    """What a recipe says of a source: its name, its file where it has one of its own, and its digest."""
    if source is None:
        return None
    file = os.path.abspath(source.content) if isinstance(source.content, Path) else None
    return {"name": source.name, "file": file, "sha256": source.digest}


def shown_settings(info: AdapterInfo, family: BaseFamily) -> dict[str, Any]:
    """Settings that a picture depends on beside adapters, prompt and seed, with the model's own values filled in."""
    shift = info.rollout.shift or family.shift(info.rollout.num_steps)
    rollout = {"solver": info.rollout.solver, "num_steps": info.rollout.num_steps, "shift": shift}
    model = info.model.model_copy(update=family.settings).model_dump(mode="json")
    return {"code_version": code_version(), "model": model, "rollout": rollout}


@dataclass(frozen=True)
class Recipe:
    """How a picture was drawn: settings, adapters with their strengths, prompt with its source, and seed."""

    info: AdapterInfo
    adapters: tuple[tuple[Path, float], ...]
    prompt: Prompt
    seed: int


def read_recipe(path: Path, same_adapters: bool = True, same_source: bool = True, base: str | None = None) -> Recipe:
    """Read the recipe that `ngrpo sample` wrote into a picture.

    Args:
        same_adapters: whether the LoRA files must be there, unchanged; if not, they are not looked at.
        same_source: the same of the picture that was edited, where there is one.
        base: the model to draw on instead, which may have files of `model.fuse` in its weights.
    Raises:
        UserError: the picture has no recipe, or an adapter or the source is gone or has changed.
    """
    if not path.is_file():
        raise ConfigError(f"--like must be a PNG file that `ngrpo sample` wrote, but {str(path)!r} is no file")
    text = read_png_text(path)
    try:
        own = json.loads(text["ngrpo"])
        info = AdapterInfo(ModelConfig.model_validate(own["model"]), RolloutConfig.model_validate(own["rollout"]))
        adapters = [(Path(one["file"]), one["sha256"], float(one["strength"])) for one in own["adapters"]]
        prompt, seed = text["prompt"], int(text["seed"])
        edited = own.get("source")
        source = [edited[key] for key in ("name", "file", "sha256")] if edited else None
        fused = {str(name): str(sha256) for name, sha256 in own.get("fused", {}).items()}
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--like must be a PNG file that `ngrpo sample` wrote, but {str(path)!r} is none") from None
    moved = info.model.model_copy(update={"path": base or info.model.path})
    model = settled(moved, fused, [path, *(file for file, _, _ in adapters)], info.model.path)
    for name in changed_files({name: sha256 for name, sha256 in fused.items() if name in model.fuse}):
        raise UserError(
            f"{str(path)!r} was drawn on a base with {name!r} in its weights, which has changed since; put the file "
            "back as it was, or draw without --like"
        )
    for file, sha256, _ in adapters if same_adapters else []:
        if not file.is_file() or digest(file) != sha256:
            what = "has changed since" if file.is_file() else "is not there any more"
            raise UserError(f"{str(path)!r} was drawn with {str(file)!r}, which {what}; give the one with --adapter")
    picture = None
    if source and same_source:
        picture = read_source(path, source[0], source[1], source[2], "give the picture with --source")
    drawn_by = tuple((file, strength) for file, _, strength in adapters)
    return Recipe(AdapterInfo(model, info.rollout), drawn_by, Prompt(prompt, {}, picture), seed)
