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
from ngrpo_lora.adapters.reading import AdapterFile, read_adapter_file, read_metadata
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
    "kohya header": "neither diffusers nor ComfyUI reads it there",
    "tensors": "ComfyUI applies it; diffusers does for kohya's names, and for others only of FLUX.1",
}


def describe(path: str | Path) -> dict[str, Any]:
    """Everything that is known about a LoRA file, as JSON values; unknown fields are left out.

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
        file = read_adapter_file(path, text_encoders="counted")
    except UserError as error:
        if not any(re.search(LORA_KEYS, key) for key in keys):
            raise
        return said | {"unusable": str(error)}
    if file.texts:
        said["text_encoders"] = {name: text_encoder(layers) for name, layers in file.texts.items()}
        said["unusable"] = "it adapts text encoders, which are left as they are here"
    if not file.layers:
        return said
    said |= {"family": file.family, "readers": readers(file), "alpha": alpha(file)}
    ranks = Counter(layer.rank for layer in file.layers.values())
    kinds = Counter(map(kind, file.layers))
    norm = math.sqrt(sum(layer.norm() ** 2 for layer in file.layers.values()))
    said |= {"ranks": {str(rank): count for rank, count in ranks.most_common()}, "layers": dict(kinds), "norm": norm}
    own, merged = header_value(metadata, "ngrpo", {}), header_value(metadata, "ngrpo_merged", [])
    model = "" if own else " --model MODEL"
    if "unusable" not in said:
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
        return said | {"advice": "taken to be the rank; where its trainer had another, the strength is alpha / rank"}
    if scales != [1.0]:
        said["advice"] = f"{ALPHA_ADVICE[file.alpha]}; `ngrpo export` folds it in"
    return said


def kind(layer: str) -> str:
    """The kind of a layer by its diffusers name: attention, feed-forward or other."""
    if re.search(FEED_FORWARD, layer):
        return "feed-forward"
    return "attention" if re.search(r"\.(attn\d?|attention)\.", layer) else "other"


def _base(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The base model that a file's header names, as `base`; empty where it names none."""
    own = header_value(metadata, "ngrpo", {})
    named = [metadata.get(key) for key in ("modelspec.architecture", "ss_base_model_version")]
    base = own.get("model", {}).get("path") or next(filter(None, named), None)
    return {} if base is None else {"base": base}


def _training(own: dict[str, Any], merged: list[dict[str, Any]]) -> dict[str, Any]:
    """How one of our own files was trained and should be drawn, and what was merged into it."""
    said: dict[str, Any] = {"merged": merged} if merged else {}
    if "model" in own and "rollout" in own:
        model, rollout = own["model"], own["rollout"]
        said["settings"] = {key: rollout.get(key) for key in ("num_steps", "shift", "solver")} | {
            key: model.get(key) for key in ("guidance_scale", "width_px", "height_px", "num_frames")
        }
    if "rewards" in own:
        said["rewards"] = {reward.get("label") or reward["name"]: reward["weight"] for reward in own["rewards"]}
    if held_out := own.get("held_out"):
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
    for name, part in said.get("text_encoders", {}).items():
        rows.append(
            (f"text encoder {name}", f"{part['kind']}; {part['layers']} layers of rank {', '.join(part['ranks'])}")
        )
    last = ("cannot be used", said["unusable"]) if "unusable" in said else ("draw", said["draw"])
    if "layers" not in said:
        return [*rows, ("dtype", said["dtype"]), last]
    layers = ", ".join(f"{count} {kind}" for kind, count in said["layers"].items())
    strengths = ", ".join(f"{scale:g}" for scale in said["alpha"]["scales"])
    folded = "folded in" if said["alpha"]["folded"] else f"alpha / rank {strengths}, from {said['alpha']['source']}"
    rows += [
        ("family", said["family"] or "unknown"),
        ("its names are read by", read_by(said["family"], said["readers"])),
        ("rank", ", ".join(f"{rank} ({count} layers)" for rank, count in said["ranks"].items())),
        ("alpha", "; ".join([folded] * (said["alpha"]["source"] != "unsaid") + [said["alpha"].get("advice", "")])),
        ("dtype", said["dtype"]),
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
        before, after = said["held_out"]["before"], said["held_out"]["after"]
        both = [name for name in before if before[name] is not None and after.get(name) is not None]
        changes = (f"{name} {before[name]:.3f} → {after[name]:.3f}" for name in both)
        rows.append((f"held-out, {said['held_out']['iteration']} iterations", ", ".join(changes)))
    for part in said.get("merged", []):
        rows.append(("merged", f"{part['weight']:g} x {part['file']} ({part['sha256'][:12]})"))
    return [(name, value.strip("; ")) for name, value in [*rows, last]]
