"""Models without their weights, built from the small JSON files that describe them.

On the meta device everything has a shape and nothing has contents, so that a model of any size is made within a second,
and forward and backward passes through it can be counted (`planning/meter.py`). On another device the weights are
random, so that a run of any model can be timed without downloading it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.devices import resolve_device, resolve_dtype, use_device
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._index import architectures, hub_file, model_index, model_json
from ngrpo_lora.models._loading import family_class
from ngrpo_lora.models._quantization import check_quantization, quantize_linears
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.types import TextEmbeds
from ngrpo_lora.world import MODELS

__all__ = [
    "BlankPrompts",
    "Blueprint",
    "bare_transformer",
    "blank_text",
    "make_family",
    "random_family",
    "read_blueprint",
]

TRANSFORMERS = ("transformer", "transformer_2")
"""Parts that compute velocities; the second one is there where two share the noise levels."""
CONFIGS = {
    "scheduler": "scheduler_config.json",
    "guider": "guider_config.json",
    "image_processor": "preprocessor_config.json",
    "feature_extractor": "preprocessor_config.json",
}
"""Parts whose settings are not in a `config.json`."""


@dataclass(frozen=True)
class Blueprint:
    """A diffusers pipeline described by the classes and configurations of its parts.

    pipeline: its class. settings: what it is made with besides its parts. parts: by name, each with its `class` and
    `config`, or with the number of its `parameters`. origin: where this is from, in words.
    """

    pipeline: str
    settings: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    origin: str

    def parameters(self, name: str) -> int:
        """Number of parameters of a part; 0 for a part that the model comes without."""
        part = self.parts.get(name)
        if part is None:
            return 0
        if "parameters" not in part:
            part["parameters"] = sum(weight.numel() for weight in self.make(name).parameters())
        return part["parameters"]

    def make(self, name: str, device: str = "meta") -> nn.Module:
        """Build a part: without contents on the meta device, with random weights on another."""
        kind, config = self.parts[name]["class"], self.parts[name]["config"]
        with torch.device(device):
            if name in (*TRANSFORMERS, "vae"):
                return getattr(diffusers, kind).from_config(config)
            model = getattr(transformers, kind)
            return model(model.config_class.from_dict(config))


def read_blueprint(config: ModelConfig) -> Blueprint:
    """The blueprint of `model.path`: the package's own for a model that it knows, else read from the folder or the Hub.

    Raises:
        UserError: no such model, or it cannot be reached.
    """
    known = None if config.revision else architectures().get(config.path)
    if known is None:
        return read_files(config.path, config.revision)
    parts = {name: part for name, part in known.items() if name not in ("pipeline", "settings")}
    return Blueprint(known["pipeline"], known.get("settings", {}), parts, "the package's own figures")


def bare_transformer(config: ModelConfig) -> nn.Module:
    """The transformer of a model on the meta device; of one that the package does not know its `config.json` is read.

    Raises:
        UserError: no such model, or it cannot be reached.
    """
    known = None if config.revision else architectures().get(config.path)
    if known is not None:
        part = known["transformer"]
    else:
        own = model_json(str(MODELS.get(config.path, config.path)), "transformer/config.json", config.revision)
        part = {"class": own["_class_name"], "config": own}
    return Blueprint("", {}, {"transformer": part}, "").make("transformer")


@cache
def read_files(path: str, revision: str | None) -> Blueprint:
    """Read a blueprint from `model_index.json` and the `config.json` of every part."""
    folder = MODELS.get(path, Path(path))
    local = folder.is_dir()
    index = model_index(str(folder) if local else path, revision)
    parts: dict[str, dict[str, Any]] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        file = CONFIGS.get(name, "config.json")
        if name.startswith(("tokenizer", "processor")):
            file = "tokenizer_config.json"
        source = folder / name / file if local else Path(hub_file(path, f"{name}/{file}", revision))
        try:
            parts[name] = {"class": entry[1], "config": json.loads(source.read_text(encoding="utf-8"))}
        except (OSError, ValueError) as error:
            raise UserError(f"model.path {path!r}: {name}/{file} cannot be read: {error}") from None
    settings = {name: value for name, value in index.items() if name[0] != "_" and not isinstance(value, list)}
    return Blueprint(index["_class_name"], settings, parts, f"config.json files of {path}")


def make_family(blueprint: Blueprint, config: ModelConfig, device: str = "meta") -> BaseFamily:
    """A family's drawing part with the weights of `Blueprint.make`, in `model.dtype`, whose conditionings are blank.

    On the meta device its `decode` gives no pictures.

    Raises:
        UserError: there is no family for the pipeline, or the size does not fit it.
    """
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
    family = family_class(config, blueprint.pipeline)
    parts: dict[str, Any] = {}
    for name, part in blueprint.parts.items():
        if name in (*TRANSFORMERS, "vae"):
            parts[name] = in_dtype(blueprint.make(name, device), getattr(torch, config.dtype))
        elif name in ("scheduler", "guider"):
            parts[name] = getattr(diffusers, part["class"]).from_config(part["config"])
    kind = getattr(diffusers, blueprint.pipeline)
    absent = [name for name in kind._get_signature_keys(kind)[0] if name not in parts]
    pipeline = kind(**parts, **dict.fromkeys(absent), **blueprint.settings)
    for name in absent:
        if name.startswith("tokenizer"):
            limit = blueprint.parts.get(name, {}).get("config", {}).get("model_max_length", 2**63)
            setattr(pipeline, name, SimpleNamespace(model_max_length=limit))
    if device == "meta":
        pipeline.image_processor = pipeline.video_processor = SimpleNamespace(
            postprocess=lambda pixels, form: [], postprocess_video=lambda pixels, form: []
        )
    # Exported adapters name the module of their family.
    own = {"__module__": family.__module__, "load": lambda self, parts: pipeline, "tokenizers": lambda self: {}}
    made = type("Family", (family,), own)(config, device, "image")
    in_dtype(made.vae, made.dtype_of("vae"))
    made.cache = BlankPrompts(made)
    return made


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Cast a model to a number type as `from_pretrained` does: all but what its class keeps in float32."""
    exempt = model._keep_in_fp32_modules or []
    for name, weight in model.named_parameters():
        if not any(part in exempt for part in name.split(".")):
            weight.data = weight.data.to(dtype)
    for buffer in model.buffers():
        if buffer.dtype == torch.float32:
            buffer.data = buffer.data.to(dtype)
    return model


def blank_text(family: BaseFamily, prompts: int) -> TextEmbeds:
    """A conditioning of `prompts` prompts at full length whose contents do not matter: zeros, or none on meta."""
    tokens = int(family.settings["max_sequence_length"])
    tensors: dict[str, Tensor] = {}
    shapes = family.text_shapes(tokens)
    for name, shape in shapes.items():
        if name.endswith("lengths"):  # decides shapes, and is on the CPU
            tensors[name] = torch.full((prompts,), shapes[name.replace("lengths", "prompt_embeds")][0])
        else:
            tensors[name] = torch.zeros(prompts, *shape, dtype=family.dtype, device=family.device)
    return TextEmbeds(tensors)


class BlankPrompts:
    """Conditionings of a model without text encoders, which say nothing of the prompts."""

    def __init__(self, family: BaseFamily):
        self.family = family

    def encode(self, prompts: Sequence[str | Prompt], device: torch.device) -> TextEmbeds:
        """A blank row for each prompt, at full length."""
        return blank_text(self.family, len(prompts)).to(device)


def random_family(model: ModelConfig) -> BaseFamily:
    """The drawing part of a configured model with random weights, quantised as `model.quantization` says.

    Raises:
        UserError: the quantisation is not available here, or the model is not known or of another size.
    """
    device = resolve_device(model.device)
    check_quantization(model.quantization, device)
    use_device(device)
    model = model.model_copy(update={"dtype": resolve_dtype(model.dtype, device)})
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, model.dtype))  # or a large model would first be made in float32
    try:
        family = make_family(read_blueprint(model), model, device)
    finally:
        torch.set_default_dtype(default)
    if model.quantization in ("nf4", "int8"):
        for block in family.blocks:
            quantize_linears(block, model.quantization, family.device)
    elif model.quantization != "none":
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

        kind = Int8WeightOnlyConfig if model.quantization == "int8_torchao" else Float8WeightOnlyConfig
        for transformer in family.transformers:
            quantize_(transformer, kind())
    return family
