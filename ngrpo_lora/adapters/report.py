"""Describes a LoRA file for people and as JSON: its trainer, base, ranks, alpha and readers (`ngrpo info`)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open

from ngrpo_lora.adapters import namings
from ngrpo_lora.adapters.finding import find_adapter
from ngrpo_lora.adapters.names import FORMATS, KOHYA_PREFIX
from ngrpo_lora.adapters.reading import AdapterFile, examples, read_adapter_file, read_metadata
from ngrpo_lora.errors import UserError
from ngrpo_lora.records.files import digest

__all__ = ["describe", "header_value", "lines"]

Value = TypeVar("Value", dict[str, Any], list[Any])

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LORA_KEYS = r"lora|lokr_|hada_|dora_scale"
UNET_KEYS = r"(down|up|input|output|mid|middle)_block"
FEED_FORWARD = (
    r"(\.|^)(ff|ff_context|ffn|feed_forward|img_mlp|txt_mlp|proj_mlp)(\.|$)|^single_transformer_blocks.*proj_out$"
)
ALPHA_ADVICE = {
    "header": "diffusers applies it, ComfyUI does not",
    "adapter_config.json": "PEFT applies it, diffusers and ComfyUI do not",
    "tensors": "ComfyUI applies it; diffusers does for kohya's names, and for others only of FLUX.1",
}


def describe(path: str | Path, family: str | None = None) -> dict[str, Any]:
    """Everything that is known about a LoRA file, as JSON values; unknown fields are left out.

    Args:
        family: family of the model that it is of; None: found out from the file.
    Raises:
        UserError: no such file, a damaged one, a pickle, or no LoRA at all.
    """
    given, path = path, find_adapter(path, "FILE")
    shown = str(path if Path(given).exists() else given)  # of the Hub by its name, not by its place in the cache
    metadata = read_metadata(path)
    with safe_open(path, "pt") as opened:
        keys = [*opened.keys()]
        types = Counter(opened.get_slice(key).get_dtype() for key in keys)
    (stored, _), *_ = types.most_common() or [("unknown", 0)]
    said: dict[str, Any] = {"file": shown, "sha256": digest(path), "dtype": DTYPES.get(stored, stored)}
    said |= {"trainer": trainer(metadata, keys)} | _base(metadata)
    if any(re.search(UNET_KEYS, key) for key in keys):
        return said | {"unusable": "it adapts a U-Net (Stable Diffusion 1, 2 or XL), which is no flow model"}
    try:
        file = read_adapter_file(path, family, texts_alone=True)
    except UserError as error:
        if not any(re.search(LORA_KEYS, key) for key in keys):
            raise
        return said | {"unusable": str(error)}
    if file.texts:
        said["text_encoders"] = {name: text_encoder(layers) for name, layers in file.texts.items()}
    if not file.layers:
        return said | {"unusable": "it adapts text encoders alone, which are left as they are here"}
    said |= {"family": file.family, "families": [*file.families], "method": method(file)}
    said |= {
        "readers": readers(file),
        "alpha": alpha(file),
        "left_out": [*file.others],
    }
    ranks = Counter(layer.rank for layer in file.layers.values())
    kinds = Counter(map(kind, file.layers))
    norm = math.sqrt(sum(layer.norm() ** 2 for layer in file.layers.values()))
    said |= {"ranks": {str(rank): count for rank, count in ranks.most_common()}, "layers": dict(kinds), "norm": norm}
    own, merged = header_value(metadata, "ngrpo", {}), header_value(metadata, "ngrpo_merged", [])
    model = "" if own else " --model MODEL"
    said["draw"] = f'ngrpo sample --adapter {shown}{model} --prompt "..."'
    return said | _training(own, merged)


def text_encoder(layers: Mapping[str, int]) -> dict[str, Any]:
    """The kind of a text encoder (CLIP, T5 or unknown), and how many of its layers of which rank a file adapts."""
    kinds = {"CLIP": r"text_model", "T5": r"SelfAttention|EncDecAttention|DenseReluDense|encoder[._]block"}
    kind = next((kind for kind, form in kinds.items() if any(re.search(form, layer) for layer in layers)), "unknown")
    ranks = Counter(layers.values())
    return {"kind": kind, "layers": len(layers), "ranks": {str(rank): count for rank, count in ranks.most_common()}}


def header_value(metadata: Mapping[str, str], key: str, empty: Value) -> Value:
    """A field of the header parsed as JSON, or `empty` where it is missing or of another type."""
    try:
        value = json.loads(metadata.get(key, "null"))
    except ValueError:
        return empty
    return value if isinstance(value, type(empty)) else empty


def trainer(metadata: Mapping[str, str], keys: list[str]) -> str:
    """The program that wrote a LoRA file, by its header and its keys; `unknown` where neither tells."""
    if "ngrpo_merged" in metadata:
        return "ngrpo-lora, merged"
    if "ngrpo" in metadata:
        return f"ngrpo-lora {header_value(metadata, 'ngrpo', {}).get('code_version', '')}".strip()
    if name := header_value(metadata, "software", {}).get("name"):  # as ai-toolkit writes it
        return str(name)
    first = keys[0] if keys else ""
    by_name = {
        KOHYA_PREFIX: "kohya's sd-scripts or musubi-tuner",
        "lora_te": "kohya's sd-scripts",
        "lora_transformer_": "OneTrainer",
        "lycoris_": "LyCORIS or SimpleTuner",
        "base_model.model.": "PEFT",
        "diffusion_model.": "a trainer with ComfyUI's names (ai-toolkit, diffusion-pipe)",
        "transformer.": "diffusers",
    }
    return next((name for prefix, name in by_name.items() if first.startswith(prefix)), "unknown")


def readers(file: AdapterFile) -> list[str]:
    """Which of diffusers and ComfyUI understand all of the file's layer names."""
    return [] if file.family is None else namings.readers(file.naming, file.family, file.layers)


def alpha(file: AdapterFile) -> dict[str, Any]:
    """The file's alpha / rank, where it is stated, whether it is 1 (folded in), and what readers do with it if not."""
    scales = sorted({layer.scale for layer in file.layers.values()})
    said: dict[str, Any] = {"scales": scales, "source": file.alpha, "folded": scales == [1.0]}
    if file.alpha == "unsaid":
        said["advice"] = "taken to be the rank; where its trainer had another, the strength is alpha / rank"
        dim, own = (file.metadata.get(f"ss_network_{key}") for key in ("dim", "alpha"))
        if own is not None and own != dim:
            said["advice"] = f"taken to be folded in: kohya's header names {own} of {dim}, which no reader heeds"
        return said
    if scales != [1.0]:
        said["advice"] = f"{ALPHA_ADVICE[file.alpha]}; `ngrpo export` folds it in"
    return said


def method(file: AdapterFile) -> str:
    """How a file changes weights: LoRA (LoKr, LoHa and others are the same once they are read) or DoRA, with biases."""
    layers = file.layers.values()
    name = "DoRA" if any(layer.magnitude is not None for layer in layers) else "LoRA"
    return f"{name} with biases" if any(layer.bias is not None for layer in layers) else name


def kind(layer: str) -> str:
    """The kind of a layer by its diffusers name: attention, feed-forward or other."""
    if re.search(FEED_FORWARD, layer):
        return "feed-forward"
    return "attention" if re.search(r"\.(attn\d?|attention)\.", layer) else "other"


def _base(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The base model that a file's header names, as `base`; empty where it names none."""
    own = header_value(metadata, "ngrpo", {})
    named = [metadata.get(key) for key in ("modelspec.architecture", "ss_base_model_version")]
    base = mapping(own, "model").get("path") or next(filter(None, named), None)
    return {} if base is None else {"base": str(base)}


def mapping(own: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A field of a header's JSON that should be a mapping, or an empty one where it is anything else."""
    value = own.get(key)
    return value if isinstance(value, dict) else {}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of the values that are numbers."""
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def reward_weights(own: Mapping[str, Any]) -> dict[str, float]:
    """The rewards that one of our own adapters was trained on, with their weights; empty for others."""
    rewards = own.get("rewards")
    known = [reward for reward in rewards if isinstance(reward, dict)] if isinstance(rewards, list) else []
    return numbers({str(reward.get("label") or reward.get("name")): reward.get("weight") for reward in known})


def _training(own: dict[str, Any], merged: list[Any]) -> dict[str, Any]:
    """How one of our own files was trained and should be drawn, and what was merged into it."""
    parts = [part for part in merged if isinstance(part, dict) and numbers(part).keys() >= {"weight"}]
    said: dict[str, Any] = {"merged": parts} if parts else {}
    model, rollout = mapping(own, "model"), mapping(own, "rollout")
    if model and rollout:
        said["settings"] = {key: rollout.get(key) for key in ("num_steps", "shift", "solver")} | {
            key: model.get(key) for key in ("guidance_scale", "width_px", "height_px", "num_frames")
        }
    if fused := numbers(mapping(model, "fuse")):
        said["fused"] = fused
    if rewards := reward_weights(own):
        said["rewards"] = rewards
    if held_out := mapping(own, "held_out"):
        said["held_out"] = held_out
    return said


def read_by(family: str | None, known: list[str]) -> str:
    """The readers that know a file's names, and the export commands that would make it readable by others."""
    could = [reader for reader in FORMATS.get(family or "", ()) if reader in ("diffusers", "comfyui")]
    remedies = [f"`ngrpo export --format {reader}` for {reader}" for reader in could if reader not in known]
    return "; ".join(filter(None, [", ".join(known), *remedies])) or "unknown"


def lines(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The result of `describe` as rows of text for people: (label, value)."""
    rows = [("file", said["file"]), ("SHA-256", said["sha256"]), ("trainer", said["trainer"])]
    if "base" in said:
        rows.append(("base", said["base"]))
    if "fused" in said:
        files = ", ".join(f"{path} at {strength:g}" for path, strength in said["fused"].items())
        what = "which its base had taken in: `ngrpo sample` adds it, elsewhere load it too"
        rows.append(("works beside", f"{files}, {what}"))
    for name, part in said.get("text_encoders", {}).items():
        ranks = ", ".join(part["ranks"])
        rows.append((f"text encoder {name}", f"{part['kind']}; {part['layers']} layers of rank {ranks}; left out"))
    if others := said.get("left_out"):
        rows.append(
            ("left out", f"changes of {len(others)} norms or lone biases, as by diffusers ({examples(others)})")
        )
    last = ("cannot be used", said["unusable"]) if "unusable" in said else ("draw", said["draw"])
    if "layers" not in said:
        return [*rows, ("dtype", said["dtype"]), last]
    layers = ", ".join(f"{count} {kind}" for kind, count in said["layers"].items())
    strengths = ", ".join(f"{scale:g}" for scale in said["alpha"]["scales"])
    folded = "folded in" if said["alpha"]["folded"] else f"alpha / rank {strengths}, from {said['alpha']['source']}"
    rows += [
        (
            "family",
            said["family"] or (f"{' or '.join(said['families'])}; --family decides" if said["families"] else "unknown"),
        ),
        ("its names are read by", read_by(said["family"], said["readers"])),
        ("rank", ", ".join(f"{rank} ({count} layers)" for rank, count in said["ranks"].items())),
        ("alpha", "; ".join([folded] * (said["alpha"]["source"] != "unsaid") + [said["alpha"].get("advice", "")])),
        ("dtype", said["dtype"]),
        ("method", said["method"]),
        ("layers", layers),
        ("effect", f"{said['norm']:.4g} (Frobenius norm)"),
    ]
    for key in ("settings", "rewards"):
        if key in said:
            values = (
                f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in said[key].items()
                if value is not None
            )
            rows.append((key, ", ".join(values)))
    if "held_out" in said:
        before, after = (numbers(mapping(said["held_out"], time)) for time in ("before", "after"))
        changes = (f"{name} {before[name]:.3f} → {after[name]:.3f}" for name in before if name in after)
        rows.append((f"held-out, {said['held_out'].get('iteration', '?')} iterations", ", ".join(changes)))
    for part in said.get("merged", []):
        rows.append(("merged", f"{part['weight']:g} x {part.get('file')} ({str(part.get('sha256'))[:12]})"))
    return [(name, value.strip("; ")) for name, value in [*rows, last]]
