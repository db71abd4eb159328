"""What a key of a LoRA file stands for: a layer under diffusers' name, and which of its parts.

`layers.py` has the layers of each family, `namings.py` who reads which names. Sources: diffusers'
`loaders/lora_conversion_utils.py`, and which keys ComfyUI asks for (`comfy/lora.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

from ngrpo_lora.adapters.layers import ALIASES, EXCHANGED, NAMES, Names

__all__ = [
    "BLOCK_NUMBER",
    "FORMATS",
    "KOHYA_PREFIX",
    "UNMAPPED",
    "diffusers_names",
    "is_exchanged",
    "is_known",
    "is_read_by_comfyui",
    "needs_original_names",
    "original_rows",
]

FORMATS: dict[str, tuple[str, ...]] = {
    "flux": ("diffusers", "comfyui", "kohya"),
    "flux2_klein": ("diffusers", "comfyui", "kohya"),
    "hunyuan_video15": ("diffusers", "comfyui"),
    "qwen_image": ("diffusers", "comfyui", "kohya"),
    "sana": ("diffusers",),
    "sd3": ("diffusers", "comfyui"),
    "wan": ("diffusers", "comfyui", "kohya"),
    "z_image": ("diffusers", "comfyui", "kohya"),
}
"""The formats that each family's readers understand. Of SD3 and HunyuanVideo 1.5 ComfyUI reads kohya's names, diffusers
does not."""

KOHYA_PREFIX = "lora_unet_"
FLAT_PREFIXES = (KOHYA_PREFIX, "lora_transformer_", "lycoris_")
PREFIXES = r"(?:(?:base_model|model|module|pipe|dit|diffusion_model|transformer)\.)*"

EVERY_LAYER = ".*"
UNMAPPED = {
    "flux2_klein": r"time_guidance_embed\..*|\w+_stream_modulation\w*\.linear",
    "hunyuan_video15": EVERY_LAYER,
    "wan": EVERY_LAYER,
    "z_image": "siglip_.*",
}
"""By family, the layers whose diffusers name ComfyUI does not know; it knows every original name."""

BLOCK_NUMBER = r"(?<=blocks[._])\d+|(?<=layers[._])\d+|(?<=refiner[._])\d+"


def diffusers_names(name: str, family: str | None) -> tuple[str, ...]:
    """The diffusers layers that a file's key stands for, such as `lora_unet_double_blocks_3_img_attn_qkv`.

    Names with dots that are in no table are diffusers' own: they are returned without their prefix. The result is empty
    for a name with underscores that is unknown.
    """
    original, diffusers = _tables(family)
    bare, flat = _without_prefix(name)
    found = _look_up(bare, original, flat) or (_look_up(bare, diffusers, flat) if flat else (bare,))
    if found in ((), (bare,)) and (part := re.fullmatch(r"(.+)[._](\d)", bare)):  # one part of a fused layer
        parts = _look_up(part[1], original, flat)
        return parts[int(part[2]) :][:1] if len(parts) > 1 else found
    return found


def is_exchanged(name: str, family: str | None) -> bool:
    """Whether a file's key stands for a layer with a shift and a scale, which diffusers has the other way round."""
    bare, flat = _without_prefix(name)
    return bool(_look_up(bare, {form: (form,) for form in EXCHANGED.get(family or "", ())}, flat))


def needs_original_names(family: str, layers: Iterable[str]) -> bool:
    """Whether ComfyUI knows some of these diffusers layers by their original names alone."""
    return family in UNMAPPED and any(re.fullmatch(UNMAPPED[family], layer) for layer in layers)


def is_read_by_comfyui(family: str) -> bool:
    """Whether ComfyUI has the family, and knows the layers of its blocks, which runs adapt, by diffusers' names."""
    return "comfyui" in FORMATS[family] and UNMAPPED.get(family) != EVERY_LAYER


def original_rows(layer: str, family: str) -> tuple[str, int, int, int] | None:
    """Where a diffusers layer lies in the original model: (original layer, first, share, total).

    It fills `share` of that layer's `total` shares of rows, from share `first` on. None: it has no name there.
    """
    for number in (*re.findall(r"\d+", layer), ""):
        for form, forms in NAMES[family].items():
            parts = [part.format(number) for part in forms]
            if layer in parts:
                shares = row_shares(parts)
                place = parts.index(layer)
                return form.format(number), sum(shares[:place]), shares[place], sum(shares)
    return None


def row_shares(parts: Sequence[str]) -> list[int]:
    """Relative row counts of layers fused into one; FLUX.1's feed-forward layer is four times as wide as a query's."""
    return [4 if part.endswith("proj_mlp") else 1 for part in parts]


def is_known(name: str, family: str) -> bool:
    """Whether a family's table has all the diffusers layers that a file's key stands for."""
    diffusers = _tables(family)[1]
    layers = diffusers_names(name, family)
    return bool(layers) and all(_look_up(layer, diffusers) for layer in layers)


@cache
def _tables(family: str | None) -> tuple[Names, Names]:
    """A family's layers by original and by diffusers' names; both tables are empty for an unknown family."""
    original = NAMES.get(family or "", {})
    diffusers: Names = {part: (part,) for parts in original.values() for part in parts}
    return original | ALIASES.get(family or "", {}), diffusers


def _without_prefix(name: str) -> tuple[str, bool]:
    """A file's name of a layer without what trainers put before it, and whether it has underscores in place of dots."""
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix).lstrip("_"), True
    return re.sub(f"^{PREFIXES}", "", name.replace("_orig_mod.", "")), False


def _look_up(name: str, table: Names, flat: bool = False) -> tuple[str, ...]:
    """The layers that a name stands for in a table; `flat` names have underscores in place of dots."""
    numbers = re.findall(BLOCK_NUMBER, name)
    number = numbers[0] if numbers else ""
    for form, layers in table.items():
        if (form.replace(".", "_") if flat else form).replace("{}", number, 1) == name:
            return tuple(layer.replace("{}", number) for layer in layers)
    return ()
