"""Settings with which a model or an adapter is drawn on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from ngrpo_lora.adapters.contents import fused_digests, settled
from ngrpo_lora.adapters.header import AdapterInfo, read_adapter
from ngrpo_lora.adapters.reading import read_metadata
from ngrpo_lora.config import ModelConfig, RolloutConfig, RunConfig, load_config, preset_names
from ngrpo_lora.config.problems import rule_in_words
from ngrpo_lora.devices import resolve_device
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models._distilled import distilled_steps
from ngrpo_lora.models._index import architectures, known_pipeline, pipeline_of
from ngrpo_lora.models._loading import family_classes
from ngrpo_lora.models._quantization import NEED_GPU
from ngrpo_lora.prompts.files import Prompt

OPTIONS = {
    "steps": "num_steps",
    "shift": "shift",
    "solver": "solver",
    "guidance": "guidance_scale",
    "height": "height_px",
    "width": "width_px",
}
"""Options of `ngrpo sample`, and the settings that they change."""


def drawing_settings(
    adapter: str | Path | None, model: str | None, device: str = "auto", beside: Sequence[Path] = ()
) -> AdapterInfo:
    """Settings to draw with on this machine: see `own_settings`; `model` replaces the base that an adapter names.

    A file of `model.fuse` that `model` has in its weights is left out, and one that was moved is looked for.

    Args:
        beside: other adapters, beside which such a file may be.
    Raises:
        UserError: as `own_settings`, or a file of `model.fuse` is nowhere to be found.
    """
    info = own_settings(model, adapter)
    if adapter is not None and info.model.fuse:
        own, fused = read_adapter(adapter).model, fused_digests(read_metadata(adapter))
        settings = settled(info.model, fused, {Path(adapter), *beside}, own.path)
        info = AdapterInfo(settings, info.rollout)
    return on_this_machine(info, None, device)


def leading(adapters: Sequence[Path]) -> Path | None:
    """The adapter that says how several are drawn: the first that was trained here, else the first."""
    return next((path for path in adapters if "ngrpo" in read_metadata(path)), adapters[0] if adapters else None)


def own_settings(path: str | None, adapter: str | Path | None = None) -> AdapterInfo:
    """How a model is drawn: as an adapter says that was trained here, else as its preset or its family's trains it.

    Only size, frames, steps and negative prompt are a preset's; shift and guidance are the model's own, and so are the
    steps of a model that is distilled. A model without a preset has the defaults, but 1024 x 1024 pixels.

    Args:
        path: the model; None is the one that the adapter names, or `embedded`.
    Raises:
        UserError: there is no such model, or the file is not an adapter.
    """
    if adapter is not None and "ngrpo" in read_metadata(adapter):
        info = read_adapter(adapter)
        return AdapterInfo(info.model.model_copy(update={"path": path or info.model.path}), info.rollout)
    if path in (None, "embedded"):
        return AdapterInfo(ModelConfig(), RolloutConfig())
    presets, known = preset_by_model(), architectures()
    found = presets.get(path)
    if found is None:
        pipeline = known_pipeline(ModelConfig(path=path))
        alike = (run for model, run in presets.items() if known.get(model, {}).get("pipeline") == pipeline)
        found = next(alike, None)
    model, num_steps = ModelConfig(path=path, height_px=1024, width_px=1024), RolloutConfig().num_steps
    if found is not None:
        kept = found.model.model_dump(include={"height_px", "width_px", "num_frames", "negative_prompt"})
        model, num_steps = ModelConfig(path=path, **kept), found.rollout.num_steps
    distilled = distilled_steps(model)
    return AdapterInfo(model, RolloutConfig(num_steps=distilled[0] if distilled else num_steps))


@cache
def preset_by_model() -> dict[str, RunConfig]:
    """Load the shipped presets by `model.path`; of several for one model the first."""
    runs: dict[str, RunConfig] = {}
    for name in preset_names():
        run = load_config(name)
        runs.setdefault(run.model.path, run)
    return runs


def on_this_machine(info: AdapterInfo, model: str | None, device: str = "auto") -> AdapterInfo:
    """Settings with this machine's device, unquantised where quantization needs a GPU; `model` replaces the base."""
    config = info.model.model_copy(update={"device": device} | ({"path": model} if model else {}))
    if config.quantization in NEED_GPU and not resolve_device(device).startswith("cuda"):
        config = config.model_copy(update={"quantization": "none"})  # pictures differ by its rounding
    return AdapterInfo(config, info.rollout)


def editing(info: AdapterInfo, prompts: Iterable[Prompt]) -> AdapterInfo:
    """Set a model that both draws and edits to edit where a prompt has a source, unless `model.edits` says which.

    Raises:
        UserError: no such model, or no family for it.
    """
    model = info.model
    if model.edits is not None or not any(prompt.source for prompt in prompts):
        return info
    does_both = len({kind.edits for kind in family_classes(model, pipeline_of(model))}) > 1
    return AdapterInfo(model.model_copy(update={"edits": True}), info.rollout) if does_both else info


def with_settings(info: AdapterInfo, changes: Mapping[str, str | float | None]) -> AdapterInfo:
    """Change settings by the names of the command's options; None leaves one as it is.

    Raises:
        ConfigError: one line per value that is not possible.
    """
    given = {OPTIONS[option]: value for option, value in changes.items() if value is not None}
    model, rollout = (
        part.model_dump() | {key: value for key, value in given.items() if key in type(part).model_fields}
        for part in (info.model, info.rollout)
    )
    try:
        return AdapterInfo(ModelConfig.model_validate(model), RolloutConfig.model_validate(rollout))
    except ValidationError as error:
        named = {field: option for option, field in OPTIONS.items()}
        rules = [(named[str(detail["loc"][0])], rule_in_words(detail), detail["input"]) for detail in error.errors()]
        raise ConfigError(
            f"--{option} {rule}" + ("" if ", got " in rule else f", got {value!r}") for option, rule, value in rules
        ) from None
