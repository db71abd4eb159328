"""How trainers call the layers in their files, and which of diffusers and ComfyUI read them (`ngrpo formats`).

What is said of diffusers is tested with its own loader, layer by layer. What is said of ComfyUI is from its source:
`comfy/lora.py` and the maps of diffusers' names in `comfy/utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ngrpo_lora.adapters.layers import NAMES, XLABS, Names
from ngrpo_lora.adapters.names import BLOCK_NUMBER, FORMATS, UNMAPPED

__all__ = ["NAMINGS", "READERS", "Naming", "cells", "left_out", "naming_of", "readers"]


@dataclass(frozen=True)
class Naming:
    """One way to call the layers of a model in a file."""

    name: str
    key: str
    """Key of a layer's down matrix, with `{diffusers}` or `{original}` for the layer's name there, or with `{part}` for
    the original name and the number of its part where it is fused; underscores stand for dots in `{original_}`."""
    trainers: str
    families: Sequence[str] = (*NAMES,)

    def layers(self, family: str) -> Names:
        """The layers that this naming has names for, in the form of `layers.NAMES`."""
        return XLABS if self.name == "XLabs" else NAMES[family]

    def keys(self, original: str, parts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Keys for one original layer, each with the diffusers layers among `parts` that it stands for."""
        if "{original" in self.key:
            return {self._filled(original): (*parts,)}
        if "{part" in self.key:
            names = [f"{original}.{index}" for index in range(len(parts))] if len(parts) > 1 else [original]
        else:
            names = parts
        return {self._filled(name): (part,) for name, part in zip(names, parts, strict=True)}

    def _filled(self, name: str) -> str:
        return re.sub(r"\{[a-z]+(_?)\}", lambda found: name.replace(".", "_") if found[1] else name, self.key, count=1)


NAMINGS = (
    Naming("diffusers", "transformer.{diffusers}.lora_A.weight", "diffusers, SimpleTuner, ai-toolkit, OneTrainer"),
    Naming("diffusers down", "transformer.{diffusers}.lora_down.weight", "OneTrainer (FLUX.2, Qwen-Image, Z-Image)"),
    Naming("PEFT", "base_model.model.{diffusers}.lora_A.weight", "PEFT"),
    Naming("PEFT named", "{diffusers}.lora_A.default.weight", "PEFT, DiffSynth-Studio; any adapter's name"),
    Naming("bare", "{diffusers}.lora_A.weight", "diffusers' save_lora_adapter"),
    Naming("ComfyUI", "diffusion_model.{original}.lora_A.weight", "ai-toolkit, diffusion-pipe, OneTrainer"),
    Naming("ComfyUI down", "diffusion_model.{original}.lora_down.weight", "extracted and distilled LoRAs"),
    Naming("ComfyUI of diffusers", "diffusion_model.{diffusers}.lora_A.weight", "ai-toolkit (Qwen-Image, Z-Image)"),
    Naming("original", "{original}.lora_A.weight", "Black Forest Labs (control), OneTrainer"),
    Naming("original PEFT", "base_model.model.{original}.lora_A.weight", "fal, PEFT on the original code"),
    Naming("kohya", "lora_unet_{original_}.lora_down.weight", "sd-scripts, musubi-tuner, OneTrainer"),
    Naming("kohya of diffusers", "lora_unet_{diffusers_}.lora_down.weight", "musubi-tuner (Qwen-Image, Z-Image)"),
    Naming("OneTrainer", "lora_transformer_{diffusers_}.lora_down.weight", "OneTrainer (legacy)"),
    Naming("OMI", "transformer.{part}.lora_down.weight", "OneTrainer (older versions)"),
    Naming("LyCORIS", "lycoris_{diffusers_}.lora_down.weight", "LyCORIS, SimpleTuner"),
    Naming("XLabs", "{original}.down.weight", "XLabs", ("flux",)),
)

DOWN = r"(\.lora_A(\.[^.]+)?|\.lora_down|_lora\d?\.down)\.weight$"  # ends of a down matrix's key in these namings

NO_BLOCK = r"(?!(single_transformer_|transformer_)?blocks\.).*"
SIGLIP = UNMAPPED["z_image"]
MAPPED = {"flux": "", "flux2_klein": UNMAPPED["flux2_klein"], "sd3": ""}
EVERY = dict.fromkeys((family for family in NAMES if family != "sana"), "")  # which ComfyUI does not run
QWEN_AND_Z = {"qwen_image": "", "z_image": SIGLIP}

READERS: dict[str, dict[str, dict[str, str]]] = {
    "diffusers": {
        "diffusers": dict.fromkeys(NAMES, "") | {"sana": r".*\.conv_depth"},
        "PEFT": {"flux2_klein": NO_BLOCK},
        "PEFT named": {"qwen_image": "", "z_image": ""},
        "ComfyUI": {
            "flux2_klein": r"norm_out\.linear",  # its halves are not exchanged
            "qwen_image": "",
            "wan": "patch_embedding",
            "z_image": r".*\.attention\..*|all_.*",
        },
        "ComfyUI down": {
            "flux": NO_BLOCK,
            "qwen_image": "",
            "wan": NO_BLOCK,  # where these have an alpha
            "z_image": r".*\.attention\.to_[qkv]|all_.*",
        },
        "ComfyUI of diffusers": {"flux2_klein": NO_BLOCK, "qwen_image": "", "z_image": ""},
        "original PEFT": {"flux2_klein": r"norm_out\.linear"},
        "kohya": {
            "flux": NO_BLOCK,
            "flux2_klein": r".*\.guidance_embedder\..*|\w+_stream_modulation\w*\.linear|norm_out\.linear",
            "qwen_image": "",
            "wan": NO_BLOCK,
            "z_image": f"{SIGLIP}|all_.*",
        },
        "kohya of diffusers": QWEN_AND_Z,
        "OneTrainer": {"flux": r"(single_)?transformer_blocks\.\d+\.(?!attn\.).*"},
        "XLabs": {"flux": ""},
    },
    "comfyui": {
        "diffusers": MAPPED | QWEN_AND_Z,
        "diffusers down": MAPPED | QWEN_AND_Z,
        "PEFT": {"sd3": ""},
        "PEFT named": QWEN_AND_Z,
        "bare": QWEN_AND_Z,
        "ComfyUI": EVERY,
        "ComfyUI down": EVERY,
        "ComfyUI of diffusers": QWEN_AND_Z,
        "original": {"qwen_image": ""},
        "kohya": EVERY,
        "kohya of diffusers": {"qwen_image": ""},
        "OneTrainer": MAPPED,
        "LyCORIS": MAPPED | QWEN_AND_Z,
    },
}
"""By reader, naming and family a pattern of the diffusers layers that are left out, or that make it refuse the file."""


def left_out(reader: str, naming: str, family: str, layers: Iterable[str]) -> list[str]:
    """The layers that a reader does not take from a file of this naming; all of them where it does not read it."""
    pattern = READERS[reader].get(naming, {}).get(family, ".*")
    return [layer for layer in layers if re.fullmatch(pattern, layer)]


def readers(naming: str, family: str, layers: Iterable[str]) -> list[str]:
    """Which of diffusers and ComfyUI take all these layers from a file of this naming."""
    names = [*layers]
    return [reader for reader in READERS if not left_out(reader, naming, family, names)]


def naming_of(keys: Iterable[str], family: str | None) -> str:
    """The naming that has all of a file's keys, or an empty text where none does, as in mixed files."""
    downs = [key for key in keys if re.search(DOWN, key)]
    if family is None or not downs:
        return ""
    found = {re.sub(r"(?<=\.lora_A\.)[^.]+(?=\.weight$)", "default", re.sub(BLOCK_NUMBER, "{}", key)) for key in downs}
    for naming in NAMINGS:
        if family in naming.families:
            known = (naming.keys(original, parts) for original, parts in naming.layers(family).items())
            if found <= {key for keys_of_one in known for key in keys_of_one}:
                return naming.name
    return ""


def written_as(family: str, naming: str) -> str | None:
    """The format of `ngrpo export` that writes a naming for a family, or None."""
    if naming == "ComfyUI":
        return "comfyui" if family in UNMAPPED and "comfyui" in FORMATS[family] else None
    return naming if naming in FORMATS[family] else None


def cells() -> Iterator[dict[str, Any]]:
    """Every family in every naming as JSON values: its format of `ngrpo export` if it is written, and its readers.

    A reader comes with the layers that it leaves out (`starts`).
    """
    for naming in NAMINGS:
        for family in naming.families:
            layers = [part.replace("{}", "0") for parts in naming.layers(family).values() for part in parts]
            lacks = {reader: left_out(reader, naming.name, family, layers) for reader in READERS}
            yield {
                "family": family,
                "naming": naming.name,
                "key": naming.key,
                "trainers": naming.trainers,
                "written": written_as(family, naming.name),
                "readers": {
                    reader: starts(missing, layers) for reader, missing in lacks.items() if len(missing) < len(layers)
                },
            }


def starts(some: Sequence[str], layers: Iterable[str]) -> list[str]:
    """The shortest starts of names that only these layers among all have, with N for the number of a block."""
    others = [f"{layer}." for layer in set(layers) - {*some}]
    found = []
    for layer in some:
        steps = accumulate(layer.split("."), lambda start, step: f"{start}.{step}")
        found.append(next(step for step in steps if not any(other.startswith(f"{step}.") for other in others)))
    return list(dict.fromkeys(re.sub(BLOCK_NUMBER, "N", start) for start in found))
