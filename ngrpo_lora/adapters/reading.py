"""Reads LoRA files of any trainer into layers under diffusers' names (`names.py`), with alpha known.

Pickle files (.bin, .pt, .ckpt) run code when they are loaded, and are refused.
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

from ngrpo_lora.adapters.finding import STANDARD_NAMES, find_adapter, refuse_pickle
from ngrpo_lora.adapters.names import diffusers_names, guess_family, is_exchanged, row_shares, split_key
from ngrpo_lora.adapters.namings import naming_of
from ngrpo_lora.errors import UserError

__all__ = ["AdapterFile", "Layer", "check_fits", "examples", "read_adapter_file", "read_metadata", "warn_of_alpha"]

log = logging.getLogger(__name__)


AlphaSource = Literal["tensors", "header", "adapter_config.json", "kohya header", "unsaid"]


OTHER_METHODS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", ".lokr_": "LoKr", ".hada_": "LoHa"}
TEXT_ENCODERS = r"(?:base_model\.model\.)?(lora_te\d*|text_encoder(?:_\d)?)[._](.+)"


@dataclass(frozen=True)
class Layer:
    """What an adapter adds to one layer's weight: `scale * up @ down`.

    down: (r, in), of a convolution (r, in, k, k). up: (out, r), of a convolution (out, r, 1, 1).
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The rank of this LoRA pair, the number of rows of its down matrix."""
        return len(self.down)

    @property
    def folded(self) -> Tensor:
        """`scale * up` in float32, the up matrix with alpha folded in."""
        return self.up.float() * self.scale

    def delta(self) -> Tensor:
        """The change of the layer's weight in float32: (out, in), of a convolution (out, in * k * k)."""
        return self.folded.flatten(1) @ self.down.float().flatten(1)

    def exchanged(self) -> Layer:
        """The same with the halves of its rows exchanged, where they are a shift and a scale of `in` rows each."""
        if len(self.up) != 2 * self.down.shape[1]:
            return self
        return Layer(self.down, self.up.roll(len(self.up) // 2, 0), self.scale)

    def norm(self) -> float:
        """Frobenius norm of the weight's change, from two (r, r) products."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        square = ((up.T @ up) * (down @ down.T)).sum().item()
        return abs(self.scale) * math.sqrt(max(square, 0.0))


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA file after it was read and checked."""

    path: Path
    metadata: dict[str, str]
    layers: dict[str, Layer]
    """LoRA pairs by diffusers' names of the transformer's layers."""
    family: str | None
    """Family of the model that the file fits, by the names and sizes of its layers; None where that is not clear."""
    naming: str
    """How the file calls layers, a name of `namings.NAMINGS`; empty where it is none of them."""
    alpha: AlphaSource
    """Where the file states alpha; `unsaid` counts as equal to the rank."""
    texts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Layers of text encoders that the file adapts too, with their ranks, by the file's name of the encoder."""


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


def read_adapter_file(
    path: str | Path, family: str | None = None, text_encoders: Literal["refused", "counted"] = "refused"
) -> AdapterFile:
    """Read and check a LoRA file of any trainer.

    Args:
        path: the file, its folder, or its run's folder.
        family: family of the model it is meant for; None: guessed from the file.
        text_encoders: whether layers of text encoders, which no model here adapts, are an error or only counted.
    Raises:
        UserError: no such file, damaged, a pickle, no LoRA or one of another kind, in part unknown, or not finite.
    """
    path = find_adapter(path)
    metadata, tensors = read_metadata(path), _load(path)
    texts = _take_texts(tensors)
    if texts and text_encoders == "refused":
        shown = ", ".join(f"{len(layers)} layers of {encoder}" for encoder, layers in texts.items())
        raise _refused(path, f"it adapts text encoders too ({shown}), which are left as they are here")
    if texts and not tensors:
        return AdapterFile(path, metadata, {}, None, "", "unsaid", texts)
    pairs = _pairs(path, tensors)
    widths = {name: (pair["up"].shape[0], pair["down"].shape[1]) for name, pair in pairs.items()}
    guess = guess_family(widths, metadata)
    known = guess if family is None else family
    source, scales = _scales(path, metadata, pairs, known)
    layers: dict[str, Layer] = {}
    for name, pair in pairs.items():
        names = diffusers_names(name, known)
        if not names:
            what = "that no model known here has" if family is None else f"that {family} does not have"
            raise _refused(path, f"it adapts a layer {what}, {name!r}")
        layer = Layer(pair["down"], pair["up"], scales[name])
        if not (layer.down.isfinite().all() and layer.up.isfinite().all() and math.isfinite(layer.scale)):
            raise UserError(f"adapter {str(path)!r} has weights that are not finite, in {name!r}; it cannot be used")
        for part, part_layer in zip(names, _split(path, name, layer, names), strict=True):
            if part in layers:
                raise _refused(path, f"it adapts {part!r} twice")
            layers[part] = part_layer.exchanged() if is_exchanged(name, known) else part_layer
    return AdapterFile(path, metadata, layers, guess, naming_of(tensors, known), source, texts)


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"adapter {str(path)!r} is no LoRA that can be used here: {why}")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter {str(path)!r} is no readable safetensors file: {error}") from None


def _take_texts(tensors: dict[str, Tensor]) -> dict[str, dict[str, int]]:
    """Move tensors of text encoders out of `tensors`; returns the ranks of their layers by encoder and layer."""
    texts: dict[str, dict[str, int]] = {}
    for key in [*tensors]:
        if found := re.fullmatch(TEXT_ENCODERS, key):
            tensor, layers = tensors.pop(key), texts.setdefault(found[1], {})
            layer, *side = re.split(r"[._]lora[._](?:linear_layer\.)?|\.(?=\w+$)", found[2], maxsplit=1)
            rank = len(tensor) if side and side[0].startswith(("A.", "down.")) else 0
            layers[layer] = max(layers.get(layer, 0), rank)
    return dict(sorted(texts.items()))


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of each layer by the file's names: `down`, `up` and, where the file has it, `alpha`."""
    if other := {method for key in tensors for mark, method in OTHER_METHODS.items() if mark in key}:
        raise _refused(path, f"it is a {', '.join(sorted(other))}, not a plain pair of matrices a layer")
    pairs: dict[str, dict[str, Tensor]] = {}
    unknown = [key for key in tensors if split_key(key) is None]
    split = [(found, tensor) for key, tensor in tensors.items() if (found := split_key(key))]
    if len(adapters := sorted({adapter for (_, _, adapter), _ in split if adapter})) > 1:
        raise _refused(path, f"it holds {len(adapters)} adapters ({examples(adapters)}); save one of them alone")
    for (name, part, _), tensor in split:
        if part in pairs.setdefault(name, {}):
            raise _refused(path, f"it has the {part} matrix of {name!r} twice, under two names")
        pairs[name][part] = tensor
    if not pairs:
        raise _refused(path, f"none of its keys is one of a LoRA ({examples(unknown)})")
    if unknown:
        raise _refused(path, f"{len(unknown)} of its {len(tensors)} keys are not of a LoRA ({examples(unknown)})")
    if half := [name for name, pair in pairs.items() if not {"down", "up"} <= pair.keys()]:
        raise _refused(path, f"only one of the two matrices is there for {examples(half)}")
    for name, pair in pairs.items():
        down, up = pair["down"].shape, pair["up"].shape
        if len(down) < 2 or len(up) != len(down) or up[1] != down[0] or not down[0]:
            raise _refused(path, f"the matrices of {name!r} do not fit each other: {tuple(down)} and {tuple(up)}")
    return pairs


def _scales(
    path: Path, metadata: Mapping[str, str], pairs: Mapping[str, dict[str, Tensor]], family: str | None
) -> tuple[AlphaSource, dict[str, float]]:
    """Where the file states alpha, and alpha / rank of every layer."""
    ranks = {name: len(pair["down"]) for name, pair in pairs.items()}
    if any("alpha" in pair for pair in pairs.values()):
        return "tensors", {name: float(pair.get("alpha", ranks[name])) / ranks[name] for name, pair in pairs.items()}
    try:
        found = _peft_config(path, metadata)
        if found is not None:
            source, config = found
            return source, {
                name: _peft_scale(config, (diffusers_names(name, family) or (name,))[0], rank)
                for name, rank in ranks.items()
            }
        scale = float(metadata["ss_network_alpha"]) / float(metadata["ss_network_dim"])
        return "kohya header", dict.fromkeys(ranks, scale)
    except (KeyError, ZeroDivisionError):
        return "unsaid", dict.fromkeys(ranks, 1.0)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"adapter {str(path)!r} says of its alpha what cannot be understood: {error}") from None


def _peft_config(path: Path, metadata: Mapping[str, str]) -> tuple[AlphaSource, dict[str, Any]] | None:
    """PEFT's settings in the header, as diffusers writes them, or in the file beside an `adapter_model.safetensors`."""
    if "lora_adapter_metadata" in metadata:
        config = json.loads(metadata["lora_adapter_metadata"])
        return "header", {key.removeprefix("transformer."): value for key, value in config.items()}
    beside = path.with_name("adapter_config.json")
    if path.name == STANDARD_NAMES[1] and beside.is_file():
        return "adapter_config.json", json.loads(beside.read_text(encoding="utf-8"))
    return None


def _peft_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / rank, for rank-stabilised LoRA (arXiv 2312.03732) alpha / sqrt(rank); patterns as PEFT matches them."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(own, config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _split(path: Path, name: str, layer: Layer, parts: Sequence[str]) -> list[Layer]:
    """LoRA pairs of the layers that a fused one consists of, each with only the ranks that reach it."""
    if len(parts) == 1:
        return [layer]
    shares = row_shares(parts)
    width, rest = divmod(len(layer.up), sum(shares))
    if rest:
        raise _refused(path, f"{name!r} is {len(layer.up)} wide, which {len(parts)} layers cannot share")
    split = []
    for up in layer.up.split([width * share for share in shares]):
        used = up.flatten(1).any(0)
        used[0] |= not used.any()  # a layer that is left as it is has a rank too
        split.append(Layer(layer.down[used], up[:, used], layer.scale))
    return split


def check_fits(file: AdapterFile, transformer: nn.Module) -> None:
    """Check that a model has every layer that an adapter adapts, in the same size.

    Raises:
        UserError: a layer is missing or of another size; the message gives examples.
    """
    sides = {name: _sides(module) for name, module in transformer.named_modules()}
    fits = "" if file.family is None else f"; by its layers it is one of {file.family}"
    if missing := [name for name in file.layers if sides.get(name) is None]:
        raise UserError(
            f"adapter {str(file.path)!r} is no LoRA of this model: {len(missing)} of its {len(file.layers)} layers are "
            f"not there ({examples(missing)}){fits}; give the model it was trained on"
        )
    for name, layer in file.layers.items():
        own = (len(layer.up), *layer.down.shape[1:])
        if own != sides[name]:
            raise UserError(
                f"adapter {str(file.path)!r} is no LoRA of this model: {name!r} is {_size(own)} there and "
                f"{_size(sides[name] or ())} here{fits}; give the model it was trained on"
            )


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


def warn_of_alpha(file: AdapterFile) -> None:
    """Log a warning where a LoRA file does not state its alpha."""
    if file.alpha == "unsaid":
        log.warning("adapter %s does not say its alpha; it is taken to be the rank", file.path)


def examples(names: Iterable[str]) -> str:
    """The first three names, separated by commas, for messages."""
    shown = [*names]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")
