"""Reads LoRA files of any trainer into layers under diffusers' names (`names.py`), with alpha known.

Pickle files (.bin, .pt, .ckpt) run code when they are loaded, and are refused. Alpha counts where stock diffusers or
ComfyUI see it: beside the matrices, or in PEFT's settings. Kohya's header names it too, but files that were converted
from kohya's names have it folded in by then and the header left as it was, so that no reader heeds it.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ngrpo_lora.adapters import changes
from ngrpo_lora.adapters.changes import Layer, Parts
from ngrpo_lora.adapters.families import families_with, told_apart
from ngrpo_lora.adapters.finding import STANDARD_NAMES, find_adapter, refuse_pickle
from ngrpo_lora.adapters.names import diffusers_names, is_exchanged, row_shares
from ngrpo_lora.adapters.namings import naming_of
from ngrpo_lora.errors import UserError

__all__ = [
    "AdapterFile",
    "Layer",
    "check_fits",
    "check_fusible",
    "examples",
    "log_warnings",
    "read_adapter_file",
    "read_metadata",
]

log = logging.getLogger(__name__)


AlphaSource = Literal["tensors", "header", "adapter_config.json", "unsaid"]


TEXT_ENCODERS = (
    r"(?:base_model\.model\.)?((?:lora|lycoris)_(?:prior_)?te\d*|text_encoders\.\w+|(?:lora_)?text_encoder(?:_\d)?|"
    r"clip_[lgh]|t5xxl|te\d?|bundle_emb)[._](.+)"
)
"""What keys of text encoders and of embeddings begin with, under any trainer's naming, and the layer after it."""

PEFT_ALPHA = 8  # where its settings do not say

Layers = dict[str, Layer]


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA file after it was read and checked."""

    path: Path
    metadata: dict[str, str]
    layers: dict[str, Layer]
    """What it adds, by diffusers' names of the transformer's layers."""
    families: tuple[str, ...]
    """Families of models that the file fits, by its layers and its header; none where it is of an unknown model."""
    naming: str
    """How the file calls layers, a name of `namings.NAMINGS`; empty where it is none of them."""
    alpha: AlphaSource
    """Where the file states alpha; `unsaid` counts as equal to the rank."""
    texts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Layers of text encoders that the file adapts too, with their ranks, by the file's name of the encoder."""
    others: tuple[str, ...] = ()
    """What the file changes beside layers with matrices (norms, bare parameters), which diffusers leaves as it is."""

    @property
    def family(self) -> str | None:
        """The family of the model that the file fits; None where that is not clear."""
        return self.families[0] if len(self.families) == 1 else None

    @property
    def fits(self) -> str:
        """The families that it fits as words, such as `flux or sd3`."""
        return " or ".join(self.families) or "a model that is unknown here"


def read_metadata(path: str | Path) -> dict[str, str]:
    """The header metadata of a safetensors file.

    Raises:
        UserError: no such file, a pickle file, or not a safetensors file.
    """
    refuse_pickle(Path(path))
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"adapter {str(path)!r} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter {str(path)!r} is no readable safetensors file: {error}") from None


def read_adapter_file(path: str | Path, family: str | None = None, texts_alone: bool = False) -> AdapterFile:
    """Read and check a LoRA file of any trainer.

    Layers of text encoders, and changes of norms, are only counted: no model here adapts them.

    Args:
        path: the file, its folder, or its run's folder.
        family: family of the model it is meant for; None: found out from the file.
        texts_alone: whether a file that adapts text encoders and nothing else is read too, with no layers.
    Raises:
        UserError: no such file, damaged, a pickle, no LoRA or one of another kind, in part unknown, not finite, or
            one whose layers are others in one family that it fits than in another.
    """
    path = find_adapter(path)
    metadata, tensors = read_metadata(path), _load(path)
    texts = _take_texts(tensors)
    if texts and not tensors:
        if not texts_alone:
            raise _refused(path, f"it adapts {counted_texts(texts)} and nothing of the transformer")
        return AdapterFile(path, metadata, {}, (), "", "unsaid", texts)
    groups, others = _groups(path, tensors)
    source, config = _peft_config(path, metadata)
    made = {name: _made(path, name, parts) for name, parts in groups.items()}
    shapes = {name: layer.sides[:2] for name, layer in made.items()}
    known = families_with(shapes)
    fitting = told_apart(known, shapes, metadata, config)
    if any("alpha" in parts for parts in groups.values()):
        source, config = "tensors", {}
    readings = []
    for one in (family,) if family else fitting or known or (None,):
        first_names = {name: (*diffusers_names(name, one), name)[0] for name in groups}
        scales = {name: _scale(path, parts, config, first_names[name]) for name, parts in groups.items()}
        scaled = {name: changes.scaled(made[name], groups[name], scales[name]) for name in groups}
        readings.append(_named(path, scaled, one))
    if any(_differ(readings[0], other) for other in readings[1:]):
        fits = " and ".join(fitting or known)
        raise UserError(
            f"adapter {str(path)!r} fits {fits} by its layers, which are others in each; give --family, or the model"
        )
    families = (family,) if family in known else fitting
    naming = naming_of(tensors, families[0] if len(families) == 1 else family)
    return AdapterFile(path, metadata, readings[0], families, naming, source, texts, others)


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"adapter {str(path)!r} is no LoRA that can be used here: {why}")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a number type that safetensors has and torch not
        raise UserError(f"adapter {str(path)!r} is no readable safetensors file: {error}") from None
    for key in tensors:
        try:
            tensors[key] = changes.readable(tensors[key])
        except ValueError as error:
            raise _refused(path, f"{key!r} {error}") from None
    return tensors


def _take_texts(tensors: dict[str, Tensor]) -> dict[str, dict[str, int]]:
    """Move tensors of text encoders out of `tensors`; returns the ranks of their layers by encoder and layer."""
    texts: dict[str, dict[str, int]] = {}
    for key in [*tensors]:
        if found := re.fullmatch(TEXT_ENCODERS, key):
            tensor, layers = tensors.pop(key), texts.setdefault(found[1], {})
            layer, *side = re.split(r"[._]lora[._](?:linear_layer\.)?|\.(?=\w+$)", found[2], maxsplit=1)
            rank = len(tensor) if side and side[0].startswith(("A.", "down.")) and tensor.ndim else 0
            layers[layer] = max(layers.get(layer, 0), rank)
    return dict(sorted(texts.items()))


def _groups(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """Tensors of each layer by the file's names, and the names of norms and others that are changed and left out."""
    methods = {name for key in tensors for form, name in changes.OTHER_METHODS.items() if re.search(form, key)}
    if methods:
        raise _refused(path, f"it is of {', '.join(sorted(methods))}, whose changes are no sums with the weights")
    try:
        groups, unknown = changes.grouped(tensors)
    except ValueError as error:
        raise _refused(path, str(error)) from None
    if not groups:
        raise _refused(path, f"none of its keys is one of a LoRA ({examples(unknown) or 'it is empty'})")
    if unknown:
        raise _refused(path, f"{len(unknown)} of its {len(tensors)} keys are not of a LoRA ({examples(unknown)})")
    others = [name for name, parts in groups.items() if changes.is_no_layer(name, parts)]
    changed = [name for name in others if any(part.any() for part in groups[name].values())]
    layers = {name: parts for name, parts in groups.items() if name not in others}
    if not layers:
        raise _refused(path, f"it changes no layer with a matrix ({examples(others)})")
    doras = [name for name, parts in layers.items() if "magnitude" in parts]
    if doras and len(doras) < len(layers):
        raise _refused(path, f"only {len(doras)} of its {len(layers)} layers have the scales of a DoRA")
    return layers, tuple(changed)


def _made(path: Path, name: str, parts: Parts) -> Layer:
    try:
        return changes.made_layer(parts)
    except ValueError as error:
        raise _refused(path, f"{name!r} {error}") from None


def _peft_config(path: Path, metadata: Mapping[str, str]) -> tuple[AlphaSource, dict[str, Any]]:
    """PEFT's settings in the header, as diffusers writes them, or in the file beside an `adapter_model.safetensors`."""
    beside = path.with_name("adapter_config.json")
    source, text = "unsaid", "{}"
    if "lora_adapter_metadata" in metadata:
        source, text = "header", metadata["lora_adapter_metadata"]
    elif path.name == STANDARD_NAMES[1] and beside.is_file():
        source, text = "adapter_config.json", beside.read_bytes()
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError(f"it is {config!r:.40}, no mapping")
    except ValueError as error:
        raise UserError(f"adapter {str(path)!r} has settings of PEFT that cannot be read: {error}") from None
    own = {key.removeprefix("transformer."): value for key, value in config.items()}
    return source, {key: value for key, value in own.items() if "." not in key}  # others are a text encoder's


def _scale(path: Path, parts: Parts, config: Mapping[str, Any], layer: str) -> float:
    """alpha / rank of a layer; 1 where nothing says alpha, or where the method knows none."""
    rank = changes.nominal_rank(parts)
    try:
        if config:
            return _peft_scale(config, layer, rank)
        if rank is None or "alpha" not in parts:
            return 1.0
        if parts["alpha"].numel() != 1:
            raise ValueError(f"{parts['alpha'].numel()} numbers for {layer!r}")
        return parts["alpha"].item() / rank
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, re.error) as error:
        raise UserError(f"adapter {str(path)!r} says of its alpha what cannot be understood: {error}") from None


def _peft_scale(config: Mapping[str, Any], layer: str, rank: int | None) -> float:
    """alpha / rank, for rank-stabilised LoRA (arXiv 2312.03732) alpha / sqrt(rank); patterns as PEFT matches them."""

    def own(kind: str, default: float) -> float:
        patterns: Mapping[str, float] = config.get(kind) or {}
        found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        return float(next(found, default))

    if config.get("peft_type", "LORA") in ("LOKR", "LOHA") or ("alpha" in config and "lora_alpha" not in config):
        return own("alpha_pattern", config.get("alpha", PEFT_ALPHA)) / own("rank_pattern", config.get("r", PEFT_ALPHA))
    if rank is None:
        return 1.0
    alpha = own("alpha_pattern", config.get("lora_alpha", PEFT_ALPHA))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _named(path: Path, read: Mapping[str, Layer], family: str | None) -> Layers:
    """Layers by diffusers' names in a family, with those that are fused in the file taken apart."""
    layers: Layers = {}
    for name, layer in read.items():
        names = diffusers_names(name, family)
        if not names:
            what = "that no model known here has" if family is None else f"that {family} does not have"
            raise _refused(path, f"it adapts a layer {what}, {name!r}")
        if not layer.is_finite():
            raise UserError(f"adapter {str(path)!r} has weights that are not finite, in {name!r}; it cannot be used")
        shares = row_shares(names)
        width, rest = divmod(len(layer.up), sum(shares))
        if rest:
            raise _refused(path, f"{name!r} is {len(layer.up)} wide, which {len(names)} layers cannot share")
        split = [layer] if len(names) == 1 else changes.split_rows(layer, [width * share for share in shares])
        for part, part_layer in zip(names, split, strict=True):
            if part in layers:
                raise _refused(path, f"it adapts {part!r} twice")
            layers[part] = part_layer.exchanged() if is_exchanged(name, family) else part_layer
    return layers


def _differ(mine: Layers, other: Layers) -> bool:
    """Whether two readings of one file are not the same layers."""
    return mine.keys() != other.keys() or any(
        layer.sides != other[name].sides or layer.scale != other[name].scale or not layer.up.equal(other[name].up)
        for name, layer in mine.items()
    )


def check_fusible(file: AdapterFile) -> None:
    """Raise UserError for a DoRA, whose scales depend on the sum and on each other file that is added."""
    if any(layer.magnitude is not None for layer in file.layers.values()):
        raise UserError(f"model.fuse {str(file.path)!r} is a DoRA, which is no sum with the base; give a plain LoRA")


def check_fits(file: AdapterFile, transformer: nn.Module, family: str | None = None) -> None:
    """Check that a model has every layer that an adapter adapts, in the same size.

    Args:
        family: the model's family; None where it is not known.
    Raises:
        UserError: a layer is missing or of another size; the message gives examples.
    """
    sides = {name: _sides(module) for name, module in transformer.named_modules()}
    missing = [name for name in file.layers if sides.get(name) is None]
    resized = [name for name, layer in file.layers.items() if name not in missing and layer.sides != sides[name]]
    if not missing and not resized:
        return
    what = f"adapter {str(file.path)!r} is no LoRA of this model: "
    if missing:
        what += f"{len(missing)} of its {len(file.layers)} layers are not there ({examples(missing)})"
    else:
        own, here = file.layers[resized[0]].sides, sides[resized[0]] or ()
        what += f"{resized[0]!r} is {_size(own)} there and {_size(here)} here"
    others = len(file.layers) - len(missing) - len(resized)
    if others:
        raise UserError(f"{what}, while its other {others} layers fit; it is of a variant of this model")
    if family in file.families:
        kind = "a variant of this model that has them" if missing else f"a {family} of another size"
        raise UserError(f"{what}; by its layers it is of {kind}")
    remedy = "; give a model of that family" if file.families else ""
    raise UserError(f"{what}; by its layers it is one of {file.fits}{remedy}")


def _sides(module: nn.Module) -> tuple[int, ...] | None:
    """(out, in) of a linear layer, LoRA or quantised too, (out, in, k, k) of a convolution; None for other modules."""
    from peft.tuners.lora import LoraLayer

    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(base, nn.Linear):
        return (base.out_features, base.in_features)
    if isinstance(base, nn.Conv2d | nn.Conv3d):
        return (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
    return None


def _size(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def log_warnings(file: AdapterFile) -> None:
    """Log what is not said in a LoRA file, and what of it is left out here."""
    if file.alpha == "unsaid":
        log.warning("adapter %s does not say its alpha; it is taken to be the rank", file.path)
    if file.texts:
        log.warning("adapter %s adapts %s too, which are left out here", file.path, counted_texts(file.texts))
    if file.others:
        what = f"{len(file.others)} norms or biases"
        log.warning("adapter %s changes %s alone, which are left out here (%s)", file.path, what, examples(file.others))
    if not any(layer.norm() or layer.bias is not None for layer in file.layers.values()):
        log.warning("adapter %s changes nothing: every product of its matrices is zero", file.path)


def counted_texts(texts: Mapping[str, Mapping[str, int]]) -> str:
    """The layers of text encoders as words, such as `12 layers of lora_te1`."""
    return ", ".join(f"{len(layers)} layers of {encoder}" for encoder, layers in texts.items())


def examples(names: Iterable[str]) -> str:
    """The first three names, separated by commas, for messages."""
    shown = [*names]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")
