"""Merges adapters: into one adapter, exactly or at a lower rank, or into the weights of a base model."""

from __future__ import annotations

import json
import logging
import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ngrpo_lora.adapters.bases import lacking, warn_of_bases, warn_of_use
from ngrpo_lora.adapters.contents import close, fused_digests, located, merged_before, names_within, strengths
from ngrpo_lora.adapters.reading import AdapterFile, Layer, examples, log_warnings, read_adapter_file
from ngrpo_lora.adapters.report import header_value, mapping, numbers, reward_weights
from ngrpo_lora.adapters.writing import peft_metadata, state_dict
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.records.files import digest, written_folder
from ngrpo_lora.world import MODELS

__all__ = ["Merged", "merge", "merge_into_base"]

log = logging.getLogger(__name__)

MIN_KEPT = 0.9  # share of a change that should be left of it in the number type of a base
KEPT = ("code_version", "family", "fused", "model", "rollout")  # of an adapter's own metadata: how it is drawn


@dataclass(frozen=True)
class Merged:
    """The weighted sum of adapters, with the metadata of its file."""

    layers: dict[str, Layer]
    metadata: dict[str, str]
    error: float
    """Norm of what a lower rank leaves out, relative to that of the exact sum."""
    files: Sequence[AdapterFile]
    """The adapters themselves."""
    weights: Sequence[float]
    """What each of them is multiplied by."""
    family: str | None = None
    """The family that was asked for, of files that fit several."""

    @property
    def entries(self) -> list[Any]:
        """What was merged, as the header says it."""
        return header_value(self.metadata, "ngrpo_merged", [])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The layers as diffusers' LoRA state dict, float32."""
        return state_dict(self.layers)


def merge(sources: Sequence[tuple[str, float]], rank: int | None = None, family: str | None = None) -> Merged:
    """The weighted sum of adapters: their ranks concatenated, or the best approximation of a lower rank (SVD).

    Args:
        sources: files, each with its weight.
        rank: the highest rank of a layer; None keeps the sum of all ranks, which is exact.
        family: family of the model that they are of; None: found out from the files.
    Raises:
        UserError: a file that cannot be read or is a DoRA, adapters of different models, or a sum that overflows.
    """
    files = [read_adapter_file(path, family) for path, _ in sources]
    for file in files:
        log_warnings(file)
    _check_alike(files)
    inside = {sha256 for file in files for sha256 in fused_digests(file.metadata).values()}
    warn_of_bases(file for file in files if digest(file.path) not in inside)
    layers: dict[str, Layer] = {}
    for name in dict.fromkeys(name for file in files for name in file.layers):
        pairs = [
            (file.layers[name], weight) for file, (_, weight) in zip(files, sources, strict=True) if name in file.layers
        ]
        down = torch.cat([layer.down.float() for layer, _ in pairs])
        biases = [bias * weight for layer, weight in pairs if (bias := layer.folded_bias) is not None]
        up = torch.cat([layer.folded * weight for layer, weight in pairs], 1)
        layers[name] = Layer(down, up, bias=sum(biases[1:], biases[0]) if biases else None)
        if not (layers[name].is_finite() and layers[name].norm() <= torch.finfo(torch.float32).max):
            shown = " + ".join(
                f"{weight:g} x {str(file.path)!r}" for file, (_, weight) in zip(files, sources, strict=True)
            )
            raise UserError(f"the sum {shown} is too large for float32, in {name!r}; give smaller weights")
    error = 0.0
    if rank is not None:
        reduced = {name: _reduce(layer, rank) for name, layer in layers.items()}
        total = sum(layer.norm() ** 2 for layer in layers.values())
        error = math.sqrt(sum(lost for _, lost in reduced.values()) / total) if total else 0.0
        layers = {name: layer for name, (layer, _) in reduced.items()}
    weights = [weight for _, weight in sources]
    return Merged(layers, _metadata(files, weights, layers), error, files, weights, family)


def _check_alike(files: Sequence[AdapterFile]) -> None:
    """Raise UserError for adapters of different models, and for those that are no sums."""
    first = files[0]
    for file in files:
        if any(layer.magnitude is not None for layer in file.layers.values()):
            raise UserError(
                f"adapter {str(file.path)!r} is a DoRA, which scales the base's own weights anew, so that no sum of "
                "matrices is the same; merge plain LoRAs"
            )
    for file in files[1:]:
        if not set(file.families) & set(first.families) and (file.families or first.families):
            raise UserError(
                f"adapters must be of one model to be merged, but {str(first.path)!r} is of {first.fits} and "
                f"{str(file.path)!r} of {file.fits}"
            )
        for name in [name for name in first.layers if name in file.layers]:
            mine, other = first.layers[name].sides, file.layers[name].sides
            if mine != other:
                raise UserError(
                    f"adapters must be of one model to be merged, but {name!r} is {mine} in {str(first.path)!r} and "
                    f"{other} in {str(file.path)!r}"
                )


def _reduce(layer: Layer, rank: int) -> tuple[Layer, float]:
    """The nearest pair of at most `rank` (Eckart-Young), by QR and an (r, r) SVD, and the squared norm it lacks."""
    if layer.rank <= rank:
        return layer, 0.0
    up_q, up_r = torch.linalg.qr(layer.folded.double().flatten(1))
    down_q, down_r = torch.linalg.qr(layer.down.double().flatten(1).T)
    u, s, v = torch.linalg.svd(up_r @ down_r.T, full_matrices=False)
    root = s[:rank].sqrt()
    up = (up_q @ u[:, :rank] * root).float().view(len(layer.up), -1, *layer.up.shape[2:])
    down = (root[:, None] * v[:rank] @ down_q.T).float().view(-1, *layer.down.shape[1:])
    return Layer(down, up, bias=layer.bias), s[rank:].square().sum().item()


def _metadata(files: Sequence[AdapterFile], weights: Sequence[float], layers: Mapping[str, Layer]) -> dict[str, str]:
    """Metadata of the merged file: how it is drawn, as the first adapter that says so, and what was merged."""
    leader = next((file for file in files if header_value(file.metadata, "ngrpo", {})), files[0])
    first = leader.metadata
    merged = [
        {"file": file.path.name, "sha256": digest(file.path), "weight": weight} | _source(file)
        for file, weight in zip(files, weights, strict=True)
    ]
    metadata = {key: value for key, value in first.items() if key.startswith("modelspec.") or "base_model" in key}
    if own := _still_beside(leader, strengths(merged)):
        metadata["ngrpo"] = json.dumps({key: own[key] for key in KEPT if key in own}, sort_keys=True)
    return metadata | {
        "format": "pt",
        "lora_adapter_metadata": peft_metadata(layers),
        "ngrpo_merged": json.dumps(merged, sort_keys=True),
        "modelspec.title": " + ".join(
            f"{weight:g} x {file.path.stem}" for file, weight in zip(files, weights, strict=True)
        ),
    }


def _still_beside(file: AdapterFile, held: Mapping[str, float]) -> dict[str, Any]:
    """An adapter's own metadata without the files of `model.fuse` that a sum with it holds: they would count twice.

    Args:
        held: strengths of what was added up, by digest.
    Raises:
        UserError: the sum holds one at another strength than the adapter was trained beside.
    """
    own, fused = header_value(file.metadata, "ngrpo", {}), fused_digests(file.metadata)
    model = mapping(own, "model")
    fuse = numbers(mapping(model, "fuse"))
    inside = [name for name in fuse if fused.get(name) in held]
    for name in inside:
        if not close(held[fused[name]], fuse[name]):
            raise UserError(
                f"adapter {str(file.path)!r} works beside {name!r} at {fuse[name]:g}, so that file must be merged at "
                f"that weight, got {held[fused[name]]:g}; give {name}:{fuse[name]:g}, or leave it out"
            )
    if not inside:
        return own
    left = {name: strength for name, strength in mapping(model, "fuse").items() if name not in inside}
    kept = {name: sha256 for name, sha256 in fused.items() if name not in inside}
    own = {key: value for key, value in own.items() if key != "fused"} | {"model": model | {"fuse": left}}
    return own | ({"fused": kept} if kept else {})


def _source(file: AdapterFile) -> dict[str, Any]:
    """What is known of a merged file: the rewards that one of our own was trained on, and what was merged into it."""
    labels = reward_weights(header_value(file.metadata, "ngrpo", {}))
    inside = header_value(file.metadata, "ngrpo_merged", [])
    return ({"rewards": [*labels]} if labels else {}) | ({"merged": inside} if inside else {})


def merge_into_base(merged: Merged, base: str, output: Path) -> None:
    """Copy a model's folder with the adapters added into its transformer's weights, whose number type stays the same.

    One file of weights is in memory at a time. A change that is small beside the steps of that number type is mostly
    lost to rounding: how much of it is left, as its projection on the change, is said where that is not nearly all.

    Args:
        base: `embedded`, `embedded-edit`, or a folder as diffusers' `save_pretrained` writes it.
        output: the new folder, which must not exist yet.
    Raises:
        UserError: no such model, its weights are quantised, or it lacks a layer or has it in another size.
    """
    source = MODELS.get(base, Path(base))
    shards = sorted((source / "transformer").glob("*.safetensors"))
    if not shards:
        raise ConfigError(
            f"--base must be {' or '.join(MODELS)}, or a diffusers folder, but {base!r} holds no "
            "transformer/*.safetensors; `hf download` fetches a model of the Hub"
        )
    if output.exists():
        raise ConfigError(f"--output must be a new folder with --base, but {str(output)!r} is there")
    _check_base(merged, base, shards)
    entries = [*(known := merged_before(base)), *merged.entries]
    taken = strengths(entries)
    _warn_of_again(merged, base, strengths(known), taken)
    warn_of_use(merged.files, base, (), taken, _with_all(merged, taken, base, output))
    kept = total = 0.0
    try:
        with written_folder(output) as folder:
            shutil.copytree(source, folder, ignore=lambda place, names: [n for n in names if Path(place, n) in shards])
            for shard in shards:
                weights = load_file(shard)
                for key in weights:
                    if (change := _change(merged, key)) is not None:
                        before, weights[key] = weights[key], added(weights[key], change, key)
                        change = change.view(before.shape).double()
                        kept += float(((weights[key].double() - before.double()) * change).sum())
                        total += float(change.square().sum())
                metadata = {"format": "pt", "ngrpo_merged": json.dumps(entries, sort_keys=True)}
                save_file(weights, folder / "transformer" / shard.name, metadata)
    except OSError as error:
        raise UserError(f"--output {str(output)!r} cannot be written: {error}") from None
    if kept < MIN_KEPT * total:
        dtype = str(before.dtype).removeprefix("torch.")
        log.warning(
            f"{kept / total:.0%} of what the adapters change is left in the {dtype} numbers of {base}, the rest is "
            "lost to rounding; load the adapters beside the base, or merge them into one that is stored in float32"
        )


def _warn_of_again(merged: Merged, base: str, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Say which files a base has in its weights already, with their strengths by digest before and after."""
    for sha256, name in names_within(merged.entries).items():
        if sha256 in before:
            what = f"in its weights at {before[sha256]:g} already, which becomes {after.get(sha256, 0.0):g}"
            log.warning("%s has %s %s; leave it out, unless you mean to add to it", base, name, what)


def _with_all(merged: Merged, taken: Mapping[str, float], base: str, output: Path) -> str:
    """What to do so that a base holds all that adapters work beside, with the command that does it."""
    sources = [*zip((str(file.path) for file in merged.files), merged.weights, strict=True)]
    gone, known = [], {**taken}
    for file in merged.files:
        fused = fused_digests(file.metadata)
        for name, strength in lacking(file, [name for name, _ in sources], known).items():
            known[fused.get(name, name)] = strength
            try:
                sources.append((located(name, fused.get(name), [file.path]), strength))
            except ConfigError:
                sources.append((name, strength))
                gone.append(name)
    number = 2
    while (free := output.with_name(f"{output.name}-{number}")).exists():
        number += 1
    files = [f"{path}:{weight:.16g}" if weight != 1 or ":" in path else path for path, weight in sources]
    family = ["--family", merged.family] if merged.family else []
    command = shlex.join(["ngrpo", "merge", *files, "--base", base, "--output", str(free), *family])
    return "".join(f"put {name} back there; " for name in gone) + f"merge it too: {command}"


def _change(merged: Merged, key: str) -> torch.Tensor | None:
    """What adapters add to a base's tensor, a weight or a bias; None where it stays as it is."""
    name, _, kind = key.rpartition(".")
    layer = merged.layers.get(name)
    if layer is None:
        return None
    return {"weight": layer.delta, "bias": lambda: layer.folded_bias}.get(kind, lambda: None)()


def added(weight: torch.Tensor, change: torch.Tensor, key: str) -> torch.Tensor:
    """A weight with its change, in its own number type.

    Raises:
        UserError: that type has no such numbers.
    """
    total = (weight.float() + change.view(weight.shape)).to(weight.dtype)
    if not total.isfinite().all():
        raise UserError(f"the sum with the base is too large for {weight.dtype}, in {key!r}; give smaller weights")
    return total


def _check_base(merged: Merged, base: str, shards: Sequence[Path]) -> None:
    """Raise UserError unless the base has every layer, in its size and in floating-point numbers."""
    shapes: dict[str, tuple[list[int], str]] = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for key in file.keys():
                weight = file.get_slice(key)
                shapes[key.removesuffix(".weight")] = weight.get_shape(), weight.get_dtype()
    if missing := [name for name in merged.layers if name not in shapes]:
        raise UserError(
            f"--base {base!r} is not the adapters' model: {len(missing)} of their {len(merged.layers)} layers are not "
            f"there ({examples(missing)})"
        )
    if biases := [
        name for name, layer in merged.layers.items() if layer.bias is not None and f"{name}.bias" not in shapes
    ]:
        raise UserError(
            f"--base {base!r} has no biases in {len(biases)} layers where the adapters change them ({examples(biases)})"
        )
    for name, layer in merged.layers.items():
        shape, dtype = shapes[name]
        if shape != [*layer.sides]:
            raise UserError(f"--base {base!r} is not the adapters' model: {name!r} has the shape {shape} there")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"--base {base!r} must not be quantised, but {name!r} is {dtype}; give the original weights"
            )
