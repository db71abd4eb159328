"""What a LoRA file of any trainer changes in a MODEL: its layers as ComfyUI's patches, or why it does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from comfy.utils import swap_scale_shift
from torch import Tensor

from ngrpo_lora.adapters.names import is_exchanged, original_rows
from ngrpo_lora.adapters.reading import AdapterFile, Layer, examples, log_warnings, read_adapter_file
from ngrpo_lora.adapters.writing import state_dict
from ngrpo_lora.errors import UserError

ALPHA = ["fold in", "as ComfyUI reads it"]
FAMILIES = {
    "Flux": "flux",
    "Flux2": "flux2_klein",
    "HunyuanVideo15": "hunyuan_video15",
    "Lumina2": "z_image",
    "QwenImage": "qwen_image",
    "SD3": "sd3",
    "WAN21": "wan",
}
"""Our families by ComfyUI's model classes; variants of a model are subclasses of these."""

Patches = dict[Any, Any]
"""Patches as `comfy.lora.load_lora` gives them: by weight, or by (weight, rows), or by (weight, rows, function)."""


def family_of(model: ModelPatcher) -> str:
    """Find out which of our families a MODEL belongs to.

    Raises:
        UserError: the MODEL belongs to none.
    """
    kinds = [kind.__name__ for kind in type(model.model).__mro__]
    family = next((FAMILIES[kind] for kind in kinds if kind in FAMILIES), None)
    if family is None:
        raise UserError(
            f"MODEL must be a flow model of {', '.join(sorted(set(FAMILIES.values())))}, got a {kinds[0]}; for others "
            "there is ComfyUI's own LoraLoaderModelOnly"
        )
    return family


@dataclass(frozen=True)
class FittingAdapter:
    """A LoRA file of which every layer fits a MODEL, with its patches for that MODEL."""

    file: AdapterFile
    family: str
    patches: Patches


def read_fitting(model: ModelPatcher, path: Path, alpha: str = ALPHA[0]) -> FittingAdapter:
    """Read a LoRA file, and find the weights of a MODEL that it changes.

    Raises:
        UserError: the file is no LoRA, or one of another model; a layer that has no place in the MODEL is an error too.
    """
    family = family_of(model)
    with torch.inference_mode(False):
        file = read_adapter_file(path, family)
        layers = file.layers
        if alpha == ALPHA[1] and file.alpha != "tensors":
            layers = {name: replace(layer, scale=1.0) for name, layer in layers.items()}
        weights = model.model.state_dict()
        targets = places(model, weights, file, family)
        log_warnings(file)
        patches = comfy.lora.load_lora(engine_tensors(layers), targets, log_missing=False)
        assert len(patches) == len(layers), "two layers share a place, or ComfyUI does not read diffusers' names"
        patches |= bias_patches(layers, targets, weights)
    return FittingAdapter(file, family, patches)


def engine_tensors(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Layers' matrices under the keys that ComfyUI's own engine reads, which has DoRA's scales as columns."""
    tensors = state_dict({name: replace(layer, bias=None, magnitude=None) for name, layer in layers.items()})
    scales = {f"transformer.{name}.dora_scale": layer.magnitude for name, layer in layers.items()}
    return tensors | {key: scale[:, None] for key, scale in scales.items() if scale is not None}


def bias_patches(layers: Mapping[str, Layer], targets: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Patches:
    """Changes of biases as ComfyUI's patches, in part of a bias where the MODEL fuses layers.

    Raises:
        UserError: the MODEL has no such bias.
    """
    patches: Patches = {}
    for name, layer in layers.items():
        if (change := layer.folded_bias) is None:
            continue
        target = targets[f"transformer.{name}"]
        weight, *rows = (target,) if isinstance(target, str) else target
        key = f"{weight.removesuffix('.weight')}.bias"
        if key not in weights:
            raise UserError(f"an adapter that changes the bias of {name!r} needs one there, and this MODEL has none")
        patches[(key, *rows[:1]) if rows else key] = ("diff", (change,))
    return patches


def places(model: ModelPatcher, weights: Mapping[str, Tensor], file: AdapterFile, family: str) -> dict[str, Any]:
    """Weights of a MODEL that a file's layers change, by the layers' names; with rows where the MODEL fuses layers.

    Raises:
        UserError: a layer is not there, or in another size.
    """
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    found: dict[str, Any] = {}
    misfits: list[str] = []
    for name, layer in file.layers.items():
        target = known.get(f"transformer.{name}") or original_place(name, family, weights)
        key, rows, *_ = (target, None) if isinstance(target, str) else target or ("", None)
        shape = list(weights[key].shape) if key in weights else []
        if rows is not None:
            shape[0] = rows[2]
        if shape != [*layer.sides]:
            misfits.append(name)
        found[f"transformer.{name}"] = target
    if misfits:
        named = f" of another size{named_base(file)}" if family in file.families else named_base(file)
        raise UserError(
            f"adapter {file.path.name!r} is no LoRA of this MODEL, a {type(model.model).__name__} ({family}): "
            f"{len(misfits)} of its {len(file.layers)} layers are not there or have another size "
            f"({examples(misfits)}); by its layers it is one of {file.fits}{named}"
        )
    return found


def original_place(layer: str, family: str, weights: Mapping[str, Tensor]) -> Any:
    """Place of a layer that ComfyUI's own map lacks, by its name in the original code, which ComfyUI follows."""
    found = original_rows(layer, family)
    if found is None:
        return None
    name, first, share, total = found
    key = f"diffusion_model.{name}.weight"
    if is_exchanged(name, family):
        return (key, None, swap_scale_shift)
    if share == total or key not in weights:
        return key
    width = len(weights[key]) // total
    return (key, (0, first * width, share * width))


def named_base(file: AdapterFile) -> str:
    """The base that a file names, as words within a message; empty where it names none."""
    path = file.metadata.get("modelspec.title", "").removeprefix("Neighbor GRPO LoRA for ")
    return f", trained on {path}" if "ngrpo" in file.metadata and path else ""
