"""Writes LoRA layers in the format that is asked for, with alpha folded in.

Formats (`layers.py` has the names): `diffusers` is `transformer.<diffusers layer>.lora_A/.lora_B`; `comfyui` the same
where ComfyUI maps all these names, else `diffusion_model.<original layer>`; `kohya` is
`lora_unet_<original_layer>.lora_down/.lora_up/.alpha`, its fused layers block diagonal. Alpha is folded in because
ComfyUI reads none from the header, and diffusers none from kohya's.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ngrpo_lora.adapters.layers import NAMES
from ngrpo_lora.adapters.names import (
    FORMATS,
    KOHYA_PREFIX,
    is_exchanged,
    needs_original_names,
    original_rows,
    row_shares,
)
from ngrpo_lora.adapters.namings import left_out
from ngrpo_lora.adapters.reading import AdapterFile, Layer, examples
from ngrpo_lora.errors import UserError
from ngrpo_lora.records.files import written

__all__ = ["Format", "convert", "save_tensors", "state_dict"]

log = logging.getLogger(__name__)

Format = Literal["diffusers", "comfyui", "kohya"]


def state_dict(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Layers as diffusers' LoRA state dict, float32, with alpha folded in.

    Where one layer has a bias all have one, as PEFT makes them.
    """
    tensors = {}
    biased = any(layer.bias is not None for layer in layers.values())
    for name, layer in layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = layer.down.float().contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = layer.folded.contiguous()
        if biased:
            bias = layer.folded_bias
            tensors[f"transformer.{name}.lora_B.bias"] = torch.zeros(len(layer.up)) if bias is None else bias
        if layer.magnitude is not None:
            shape = (-1,) if layer.up.ndim == 2 else (1, -1, *layer.up.shape[2:])
            tensors[f"transformer.{name}.lora_magnitude_vector"] = layer.magnitude.view(shape)
    return tensors


def convert(file: AdapterFile, form: Format) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of an adapter in another format; all fields of the header that are still true stay.

    Raises:
        UserError: an unknown family, or a format that its readers do not know; the message names those that they do.
    """
    family, name = file.family, str(file.path)
    if len(file.families) > 1:
        raise UserError(
            f"adapter {name!r} fits {' and '.join(file.families)} alike by its layers, and its header does not say "
            "which of them it is of; give --family"
        )
    if family is None:
        raise UserError(
            f"adapter {name!r} is of a model that is unknown here; known are {', '.join(FORMATS)}, of which --family "
            "chooses one"
        )
    if form not in FORMATS[family]:
        raise UserError(
            f"--format {form} has no reader for an adapter of {family}; give --format {' or '.join(FORMATS[family])}"
        )
    metadata = {key: value for key, value in file.metadata.items() if key != "lora_adapter_metadata"}
    rank = Counter(layer.rank for layer in file.layers.values()).most_common(1)[0][0]
    metadata |= {"format": "pt", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    if form == "diffusers":
        return state_dict(file.layers), metadata | {"lora_adapter_metadata": peft_metadata(file.layers)}
    _check_matrices(file, form, family)
    if form == "comfyui" and not needs_original_names(family, file.layers):
        plain = {name: replace(layer, bias=None) for name, layer in file.layers.items()}
        tensors = state_dict(plain) | _bias_changes("transformer.", file.layers)
        return tensors, metadata | {"lora_adapter_metadata": peft_metadata(plain)}
    originals = _originals(file, family)
    if form == "comfyui":
        plain = {f"diffusion_model.{name}": replace(layer, bias=None) for name, layer in originals.items()}
        tensors = {key.removeprefix("transformer."): tensor for key, tensor in state_dict(plain).items()}
        return tensors | _bias_changes("diffusion_model.", originals), metadata
    _check_kohya(file, family, originals)
    if missing := left_out("diffusers", "kohya", family, file.layers):
        what = "of kohya's names diffusers leaves out %s; ComfyUI and kohya's own tools read them"
        log.warning(what, examples(missing))
    tensors = {}
    for name, layer in originals.items():
        flat = KOHYA_PREFIX + name.replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = layer.down.float().contiguous()
        tensors[f"{flat}.lora_up.weight"] = layer.folded.contiguous()
        tensors[f"{flat}.alpha"] = torch.tensor(float(layer.rank))
    return tensors, metadata | {"ss_network_module": "networks.lora"}


def peft_metadata(layers: Mapping[str, Layer]) -> str:
    """PEFT's settings for folded layers as JSON, as few as diffusers needs; ranks that differ are named in full."""
    (rank, _), *others = Counter(layer.rank for layer in layers.values()).most_common()
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": list(layers)}
    if any(layer.magnitude is not None for layer in layers.values()):
        config["use_dora"] = True
    if any(layer.bias is not None for layer in layers.values()):
        config["lora_bias"] = True
    if others:
        pattern = {f"^{re.escape(name)}": layer.rank for name, layer in layers.items() if layer.rank != rank}
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    return json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True)


def _bias_changes(prefix: str, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Changes of biases under ComfyUI's keys."""
    biases = {f"{prefix}{name}.diff_b": layer.folded_bias for name, layer in layers.items()}
    return {key: bias for key, bias in biases.items() if bias is not None}


def _check_matrices(file: AdapterFile, form: Format, family: str) -> None:
    """Raise UserError where an adapter has more than matrices, for which a format has no place or another meaning."""
    name = str(file.path)
    if any(layer.magnitude is not None for layer in file.layers.values()):
        why = "ComfyUI divides by another norm" if form == "comfyui" else "diffusers leaves its scales out"
        raise UserError(f"--format {form} cannot hold the DoRA {name!r}: {why}; give --format diffusers")
    biased = [layer for layer, change in file.layers.items() if change.bias is not None]
    if form == "comfyui" and not needs_original_names(family, file.layers):  # it finds no part of a fused layer's bias
        biased = [layer for layer in biased if (rows := original_rows(layer, family)) is None or rows[2] != rows[3]]
    elif form == "comfyui":
        biased = []
    if biased:
        raise UserError(
            f"--format {form} has no place for the biases that {name!r} changes ({examples(biased)}); give --format "
            "diffusers"
        )


def _originals(file: AdapterFile, family: str) -> dict[str, Layer]:
    """Layers by their original names, fused where the original model has one layer."""
    left, originals = dict(file.layers), {}
    numbers = sorted({int(number) for name in left for number in re.findall(r"\.(\d+)\.", name)}) or [0]
    for number in numbers:
        for form, forms in NAMES[family].items():
            parts = [part.format(number) for part in forms]
            layers = [left.pop(part, None) for part in parts]
            if any(layers):
                name, fused = form.format(number), _fuse(layers, row_shares(parts))
                originals[name] = fused.exchanged() if is_exchanged(name, family) else fused
    if left:
        raise UserError(
            f"adapter {str(file.path)!r} adapts layers that have no name in this format ({examples(left)}); "
            "--format diffusers has them"
        )
    return originals


def _fuse(parts: Sequence[Layer | None], shares: Sequence[int]) -> Layer:
    """Fuse layers into one: their ranks follow one another, each fills its own rows, and a missing layer is zeros.

    Source: sd-scripts' layout of fused layers.

    Raises:
        UserError: one is a convolution.
    """
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    if any(layer is not None and layer.down.ndim != 2 for layer in parts):
        raise UserError("layers that are one in this format must be linear, but some are convolutions in this adapter")
    there = [(layer, share) for layer, share in zip(parts, shares, strict=True) if layer is not None]
    width, ranks = len(there[0][0].up) // there[0][1], [layer.rank for layer, _ in there]
    up, start = torch.zeros(width * sum(shares), sum(ranks)), 0
    rows = up.split([width * share for share in shares])  # views
    for layer, row in zip(parts, rows, strict=True):
        if layer is not None:
            row[:, start : start + layer.rank] = layer.folded
            start += layer.rank
    biases = [
        torch.zeros(len(row)) if layer is None or layer.folded_bias is None else layer.folded_bias
        for layer, row in zip(parts, rows, strict=True)
    ]
    bias = torch.cat(biases)
    return Layer(torch.cat([layer.down.float() for layer, _ in there]), up, bias=bias if bias.any() else None)


def _check_kohya(file: AdapterFile, family: str, originals: Mapping[str, Layer]) -> None:
    """Raise UserError where diffusers would misread kohya's names: FLUX.1 of another width, or Wan's blocks in part."""
    if family == "flux":
        for name, layer in originals.items():
            if name.endswith("linear1") and len(layer.up) != 7 * 3072:
                raise UserError(
                    f"--format kohya needs the width of FLUX.1, 3072, but {str(file.path)!r} has {len(layer.up) // 7}; "
                    "give --format comfyui"
                )
    if family == "wan":
        if outside := [name for name in originals if not name.startswith("blocks.")]:
            raise UserError(
                f"--format kohya has names that diffusers reads for Wan's blocks alone, but {str(file.path)!r} adapts "
                f"{examples(outside)} too; give --format comfyui"
            )
        blocks = {name.split(".")[1] for name in originals}
        layers = [form for form in NAMES["wan"] if form.startswith("blocks.") and not form.endswith("_img")]
        expected = {form.format(block) for form in layers for block in blocks}
        if missing := sorted(expected - originals.keys()):
            raise UserError(
                f"--format kohya needs every attention and feed-forward layer of a block for diffusers to read Wan's, "
                f"but {str(file.path)!r} leaves out {examples(missing)}; give --format comfyui"
            )


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with written(path) as partial:
            save_file(tensors, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output {str(path)!r} cannot be written: {error}") from None
