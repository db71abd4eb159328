"""LoRA files of any trainer: read into layers under diffusers' names with alpha known, written in the format asked for.

Formats (`adapter_names.py` has the names): `diffusers` is `transformer.<diffusers layer>.lora_A/.lora_B`; `comfyui` the
same where ComfyUI maps these names, else `diffusion_model.<original layer>`; `kohya` is
`lora_unet_<original_layer>.lora_down/.lora_up/.alpha`, its fused layers block diagonal. What is written has alpha
folded in: ComfyUI reads none from the header, diffusers none from kohya's.

Pickle files (.bin, .pt, .ckpt) run code when they are loaded, and are refused.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ngrpo_lora.adapter_names import (
    FORMATS,
    KOHYA_PREFIX,
    NAMES,
    NATIVE_FORMATS,
    diffusers_names,
    guess_family,
    row_shares,
)
from ngrpo_lora.errors import ConfigError, UserError

__all__ = [
    "AdapterFile",
    "Format",
    "Layer",
    "adapter_label",
    "check_fits",
    "convert",
    "examples",
    "find_adapter",
    "finite_strength",
    "parse_weighted",
    "read_adapter_file",
    "read_metadata",
    "save_tensors",
    "state_dict",
    "warn_of_alpha",
]

log = logging.getLogger(__name__)

Format = Literal["diffusers", "comfyui", "kohya"]
AlphaSource = Literal["tensors", "header", "adapter_config.json", "kohya header", "unsaid"]

STANDARD_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers', PEFT's
PLACES = "a LoRA file, a run's folder or a repository of the Hub (owner/name)"
NO_OTHER = "no other safetensors file"
HUB_FILE = r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
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
        """Of the pair."""
        return len(self.down)

    @property
    def folded(self) -> Tensor:
        """`scale * up`, float32."""
        return self.up.float() * self.scale

    def delta(self) -> Tensor:
        """What is added, float32: (out, in), of a convolution (out, in * k * k)."""
        return self.folded.flatten(1) @ self.down.float().flatten(1)

    def norm(self) -> float:
        """Its Frobenius norm, by two (r, r) products."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        square = ((up.T @ up) * (down @ down.T)).sum().item()
        return abs(self.scale) * math.sqrt(max(square, 0.0))


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA file, understood."""

    path: Path
    metadata: dict[str, str]
    layers: dict[str, Layer]
    """By diffusers' names of the transformer's layers."""
    family: str | None
    """Of the model that it fits, by the names and sizes of its layers; None where that is not clear."""
    prefix: str
    """What its names begin with."""
    alpha: AlphaSource
    """Where alpha stands; `unsaid` counts as equal to the rank."""
    texts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of text encoders that it adapts too, by the file's names: its layers and their ranks."""


def find_adapter(path: str | Path, what: str = "adapter") -> Path:
    """The LoRA file itself, also when its folder, its run's folder or its repository of the Hub is given.

    What is on this disk wins; then `owner/name` is a repository, and `owner/name/file.safetensors` a file of one.

    Raises:
        ConfigError: nothing there, or several adapters in a place that names none of them as diffusers or PEFT do.
        UserError: it cannot be had from the Hub.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        if (found := re.fullmatch(HUB_FILE, path.as_posix())) is None:
            raise ConfigError(f"{what} must be {PLACES}, but {str(path)!r} does not exist")
        return _download(found[1], found[2], what)
    for folder in (path, path / "adapter"):
        if name := the_adapter((file.name for file in folder.glob("*")), str(folder), what):
            return folder / name
    raise ConfigError(f"{what} must be {PLACES}, but {str(path)!r} holds no {STANDARD_NAMES[0]} and {NO_OTHER}")


def the_adapter(names: Iterable[str], where: str, what: str) -> str | None:
    """Which of a folder's files is the adapter; None: it holds none.

    Raises:
        ConfigError: several, of which none is named as diffusers or PEFT do.
        UserError: a pickle file and nothing else.
    """
    inside = sorted(names)
    named = [name for name in STANDARD_NAMES if name in inside]
    found = named or [name for name in inside if name.endswith(".safetensors")]
    if len(found) > 1:
        raise ConfigError(f"{what} must be one LoRA, but {where!r} holds {' and '.join(found[:3])}; give the file")
    if not found and (pickles := [name for name in inside if name.endswith(PICKLE_SUFFIXES)]):
        refuse_pickle(Path(where, pickles[0]))
    return found[0] if found else None


def _download(repo: str, name: str | None, what: str) -> Path:
    """A file of a repository of the Hub, or the adapter that it holds, from the cache where it is there."""
    from huggingface_hub import hf_hub_download, model_info
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from ngrpo_lora.downloads import hub_errors

    if name is not None:
        refuse_pickle(Path(repo, name))
    shown = repr(repo if name is None else f"{repo}/{name}")
    with hub_errors(f"{what} {shown} is no file or folder here, and the repository {repo!r}", repo, "a local file"):
        try:
            return Path(hf_hub_download(repo, name or STANDARD_NAMES[0]))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            inside = [file.rfilename for file in model_info(repo).siblings or [] if "/" not in file.rfilename]
        if name is None and (found := the_adapter(inside, repo, what)):
            if found == STANDARD_NAMES[1] and "adapter_config.json" in inside:
                hf_hub_download(repo, "adapter_config.json")  # where PEFT says alpha
            return Path(hf_hub_download(repo, found))
    missing = f"{STANDARD_NAMES[0]} and {NO_OTHER}" if name is None else name
    raise ConfigError(f"{what} must be {PLACES}, but {repo!r} on the Hub holds no {missing}")


def parse_weighted(text: str, default: float = 1.0) -> tuple[str, float]:
    """`FILE:0.5` -> the path and its weight, or `default` where none is given.

    Raises:
        ConfigError: a weight that is not finite.
    """
    path, _, number = text.rpartition(":")
    try:
        path, weight = (path, float(number)) if path else (text, default)
    except ValueError:  # the colon is part of the path
        path, weight = text, default
    return path, finite_strength(path, weight)


def finite_strength(path: str, strength: float) -> float:
    """The strength of an adapter.

    Raises:
        ConfigError: it is not finite.
    """
    if not math.isfinite(strength):
        raise ConfigError(f"the strength of an adapter must be finite, got {strength} for {path!r}")
    return strength


def adapter_label(path: Path) -> str:
    """The file's name, or that of the run's folder or of the repository where the file is called what all are."""
    folder = Path(os.path.abspath(path)).parent  # the Hub's cache has links, to files with numbers for names
    run = folder.parent if folder.name == "adapter" else folder
    if folder.parent.name == "snapshots":
        run = Path(folder.parent.parent.name.rpartition("--")[2])
    return re.sub(r"[^\w.-]+", "-", run.name if path.name in STANDARD_NAMES else path.stem)


def refuse_pickle(path: Path) -> None:
    """Raise UserError for a pickle file, by its name or its first bytes; nothing of it is unpickled."""
    pickled = path.suffix in PICKLE_SUFFIXES
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(8)  # of torch.save's archive, or of a bare pickle; of safetensors the header's length
        pickled = pickled or start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and any(start[4:]))
    if pickled:
        raise UserError(
            f"adapter {str(path)!r} is a pickle file, which can run any code when it is loaded; give a .safetensors "
            "file, or have whoever made this one convert it"
        )


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
        family: of the model it is meant for; None: guessed.
        text_encoders: what becomes of layers of text encoders, which no model here adapts.
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
        return AdapterFile(path, metadata, {}, None, next(iter(texts)), "unsaid", texts)
    pairs = _pairs(path, tensors)
    widths = {name: (pair["up"].shape[0], pair["down"].shape[1]) for name, pair in pairs.items()}
    guess = guess_family(widths, metadata)
    source, scales = _scales(path, metadata, pairs, guess if family is None else family)
    layers: dict[str, Layer] = {}
    for name, pair in pairs.items():
        names = diffusers_names(name, guess if family is None else family)
        if not names:
            what = "that no model known here has" if family is None else f"that {family} does not have"
            raise _refused(path, f"it adapts a layer {what}, {name!r}")
        layer = Layer(pair["down"], pair["up"], scales[name])
        if not (layer.down.isfinite().all() and layer.up.isfinite().all() and math.isfinite(layer.scale)):
            raise UserError(f"adapter {str(path)!r} has weights that are not finite, in {name!r}; it cannot be used")
        for part, part_layer in zip(names, _split(path, name, layer, names), strict=True):
            if part in layers:
                raise _refused(path, f"it adapts {part!r} twice")
            layers[part] = part_layer
    first = next(iter(tensors))
    prefix = next((p for p in (KOHYA_PREFIX, "lora_transformer_") if first.startswith(p)), first.partition(".")[0])
    return AdapterFile(path, metadata, layers, guess, prefix, source, texts)


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"adapter {str(path)!r} is no LoRA that can be used here: {why}")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter {str(path)!r} is no readable safetensors file: {error}") from None


def _take_texts(tensors: dict[str, Tensor]) -> dict[str, dict[str, int]]:
    """Take what belongs to text encoders out of a file: by its names of them, layers and their ranks."""
    texts: dict[str, dict[str, int]] = {}
    for key in [*tensors]:
        if found := re.fullmatch(TEXT_ENCODERS, key):
            tensor, layers = tensors.pop(key), texts.setdefault(found[1], {})
            layer, *side = re.split(r"[._]lora[._](?:linear_layer\.)?|\.(?=\w+$)", found[2], maxsplit=1)
            rank = len(tensor) if side and side[0].startswith(("A.", "down.")) else 0
            layers[layer] = max(layers.get(layer, 0), rank)
    return dict(sorted(texts.items()))


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By the file's names of layers: `down`, `up` and, where the file has it, `alpha`."""
    if other := {method for key in tensors for mark, method in OTHER_METHODS.items() if mark in key}:
        raise _refused(path, f"it is a {', '.join(sorted(other))}, not a plain pair of matrices a layer")
    pairs: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in PARTS if key.endswith(suffix)), None)
        if suffix is None:
            unknown.append(key)
        else:
            pairs.setdefault(key.removesuffix(suffix), {})[PARTS[suffix]] = tensor
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
    """Where alpha stands, and alpha / rank of every layer."""
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
    """alpha / rank, of rank-stabilised LoRA (arXiv 2312.03732) alpha / sqrt(rank); patterns as PEFT matches them."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(own, config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _split(path: Path, name: str, layer: Layer, parts: Sequence[str]) -> list[Layer]:
    """The layers that a fused one consists of, each with the ranks that reach it."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Into a model


def check_fits(file: AdapterFile, transformer: nn.Module) -> None:
    """Make sure that a model has every layer that an adapter adapts, in its size.

    Raises:
        UserError: with examples.
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
    """(out, in) of a linear layer, also one that has a LoRA or is quantised, (out, in, k, k) of a convolution."""
    from peft.tuners.lora import LoraLayer

    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(base, nn.Linear):
        return (base.out_features, base.in_features)
    if isinstance(base, nn.Conv2d):
        return (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
    return None


def _size(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def state_dict(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """As diffusers has it, alpha folded in, float32."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = layer.down.float().contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = layer.folded.contiguous()
    return tensors


def warn_of_alpha(file: AdapterFile) -> None:
    """Say that a file does not tell how strong it is."""
    if file.alpha == "unsaid":
        log.warning("adapter %s does not say its alpha; it is taken to be the rank", file.path)


# ---------------------------------------------------------------------------------------------------------------------
# Into a file


def convert(file: AdapterFile, form: Format) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of the adapter in another format; of the header all stays that is still true.

    Raises:
        UserError: a format that this family's readers do not understand, with those that they do.
    """
    family, name = file.family, str(file.path)
    if family is None:
        raise UserError(f"adapter {name!r} is of a model that is unknown here; known are {', '.join(FORMATS)}")
    if form not in FORMATS[family]:
        raise UserError(
            f"--format {form} has no reader for an adapter of {family}; give --format {' or '.join(FORMATS[family])}"
        )
    metadata = {key: value for key, value in file.metadata.items() if key != "lora_adapter_metadata"}
    rank = Counter(layer.rank for layer in file.layers.values()).most_common(1)[0][0]
    metadata |= {"format": "pt", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    if form == "diffusers" or (form == "comfyui" and family not in NATIVE_FORMATS):
        return state_dict(file.layers), metadata | {"lora_adapter_metadata": peft_metadata(file.layers)}
    originals = _originals(file, family)
    if form == "comfyui":
        folded = {f"diffusion_model.{name}": layer for name, layer in originals.items()}
        return {key.removeprefix("transformer."): tensor for key, tensor in state_dict(folded).items()}, metadata
    _check_kohya(file, family, originals)
    tensors = {}
    for name, layer in originals.items():
        flat = KOHYA_PREFIX + name.replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = layer.down.float().contiguous()
        tensors[f"{flat}.lora_up.weight"] = layer.folded.contiguous()
        tensors[f"{flat}.alpha"] = torch.tensor(float(layer.rank))
    return tensors, metadata | {"ss_network_module": "networks.lora"}


def peft_metadata(layers: Mapping[str, Layer]) -> str:
    """PEFT's settings for folded layers, as little as diffusers needs; ranks that differ are named in full."""
    (rank, _), *others = Counter(layer.rank for layer in layers.values()).most_common()
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": list(layers)}
    if others:
        pattern = {f"^{re.escape(name)}": layer.rank for name, layer in layers.items() if layer.rank != rank}
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    return json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True)


def _originals(file: AdapterFile, family: str) -> dict[str, Layer]:
    """By the original names, with those layers as one that are one there."""
    left, originals = dict(file.layers), {}
    numbers = sorted({int(number) for name in left for number in re.findall(r"\.(\d+)\.", name)}) or [0]
    for number in numbers:
        for form, forms in NAMES[family].items():
            parts = [part.format(number) for part in forms]
            layers = [left.pop(part, None) for part in parts]
            if any(layers):
                originals[form.format(number)] = _fuse(layers, row_shares(parts))
    if left:
        raise UserError(
            f"adapter {str(file.path)!r} adapts layers that have no name in this format ({examples(left)}); "
            "--format diffusers has them"
        )
    return originals


def _fuse(parts: Sequence[Layer | None], shares: Sequence[int]) -> Layer:
    """One layer of all: ranks one after the other, each with rows of its own; what is missing has zeros.

    Source: sd-scripts' layout of fused layers.
    """
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    there = [(layer, share) for layer, share in zip(parts, shares, strict=True) if layer is not None]
    width, ranks = len(there[0][0].up) // there[0][1], [layer.rank for layer, _ in there]
    up, start = torch.zeros(width * sum(shares), sum(ranks)), 0
    rows = up.split([width * share for share in shares])  # views
    for layer, row in zip(parts, rows, strict=True):
        if layer is not None:
            row[:, start : start + layer.rank] = layer.folded
            start += layer.rank
    return Layer(torch.cat([layer.down.float() for layer, _ in there]), up)


def _check_kohya(file: AdapterFile, family: str, originals: Mapping[str, Layer]) -> None:
    """What diffusers' reading of kohya's names takes for granted."""
    if family == "flux":
        for name, layer in originals.items():
            if name.endswith("linear1") and len(layer.up) != 7 * 3072:
                raise UserError(
                    f"--format kohya needs the width of FLUX.1, 3072, but {str(file.path)!r} has {len(layer.up) // 7}; "
                    "give --format comfyui"
                )
    if family == "wan":
        blocks = {name.split(".")[1] for name in originals if name.startswith("blocks.")}
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
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output {str(path)!r} cannot be written: {error}") from None


def examples(names: Iterable[str]) -> str:
    """The first three."""
    shown = [*names]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")
