"""Which models a LoRA file fits: by its layers' names, their shapes and block counts, and its header's own word.

Families share names: FLUX.1's double blocks are called as FLUX.2's in the original code and as SD3's in diffusers, and
their attention as Qwen-Image's. So what names leave open, shapes decide, then the header, then the published models'
widths and depths; a file that still fits several is of none of them until its user says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from ngrpo_lora.adapters.layers import NAMES
from ngrpo_lora.adapters.names import diffusers_names, is_known
from ngrpo_lora.errors import ConfigError

__all__ = ["check_family", "families_with", "told_apart"]

Shapes = Mapping[str, tuple[int, ...]]
"""Rows and columns, (out, in), of each layer of a file, by the file's names."""

_FOURFOLD = {r"ff(_context)?\.net\.0\.proj": (4, 1), r"ff(_context)?\.net\.2": (1, 4)}

WIDTHS: dict[str, dict[str, tuple[int, int]]] = {
    "flux": {
        r"attn\.\w+(\.0)?": (1, 1),
        **_FOURFOLD,
        "proj_mlp": (4, 1),
        r"single_transformer_blocks\.\d+\.proj_out": (1, 5),
        r"norm1(_context)?\.linear": (6, 1),
        r"norm\.linear": (3, 1),
    },
    "flux2_klein": {
        r"attn\.to_qkv_mlp_proj": (9, 1),
        r"single_transformer_blocks\.\d+\.attn\.to_out": (1, 4),
        r"attn\.\w+(\.0)?": (1, 1),
        r"ff(_context)?\.linear_in": (6, 1),
        r"ff(_context)?\.linear_out": (1, 3),
    },
    "hunyuan_video15": {r"attn\.\w+(\.0)?": (1, 1), **_FOURFOLD, r"norm1(_context)?\.linear": (6, 1)},
    "qwen_image": {
        r"attn\.\w+(\.0)?": (1, 1),
        r"(img|txt)_mlp\.net\.0\.proj": (4, 1),
        r"(img|txt)_mlp\.net\.2": (1, 4),
        r"(img|txt)_mod\.1": (6, 1),
    },
    "sd3": {r"attn2?\.\w+(\.0)?": (1, 1), **_FOURFOLD},
}
"""(out, in) of layers, as multiples of the model's width, for the families whose names are alike; the first that ends a
diffusers name counts."""

SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "flux": ((3072, 19),),
    "flux2_klein": ((3072, 5), (4096, 8), (6144, 8)),
    "hunyuan_video15": ((2048, 54),),
    "qwen_image": ((3072, 60),),
    "sd3": ((1536, 24), (2432, 38)),
}
"""(width, number of joint blocks) of the published models, for the families whose names are alike."""

HEADERS = (
    (r"hunyuan[-_ ]?video[-_ ]?1[._]?5", "hunyuan_video15"),
    (r"chroma|hunyuan|hidream|auraflow|pixart|ltx|cogvideo|cosmos|kandinsky|omnigen|sdxl|sd[_-]?[12]\b", ""),
    (r"flux[._-]?2", "flux2_klein"),
    (r"flux", "flux"),
    (r"qwen", "qwen_image"),
    (r"z[_-]?image", "z_image"),
    (r"\bwan", "wan"),
    (r"\bsana", "sana"),
    (r"stable-diffusion-v?3|\bsd_?3|^3(\.5)?-|3-5-", "sd3"),
)
"""Patterns of what headers call models, each with its family, or none for a model that is unknown here; the first that
fits counts."""

SETTINGS = ("base_model_name_or_path", "auto_mapping")
WORDS = ("modelspec.architecture", "ss_base_model_version", "ss_network_module")


def check_family(name: str | None) -> None:
    """Raise ConfigError for a family that is unknown here; None, none chosen, is fine."""
    if name is not None and name not in NAMES:
        raise ConfigError(f"--family must be one of {', '.join(NAMES)}, got {name!r}")


def families_with(shapes: Shapes) -> tuple[str, ...]:
    """Families that have the layers of a file: those that know most of its names, in the shapes that it has them in.

    Args:
        shapes: rows and columns of each layer, by the file's names.
    """
    known = {family: sum(is_known(name, family) for name in shapes) for family in NAMES}
    most = max(known.values())
    named = tuple(family for family, count in known.items() if count == most > 0)
    return tuple(family for family in named if _has_shapes(family, shapes)) or named


def told_apart(
    families: tuple[str, ...], shapes: Shapes, header: Mapping[str, str], config: Mapping[str, object]
) -> tuple[str, ...]:
    """Those of the families with a file's layers that it may be of, by its header and by the published models' sizes.

    Args:
        families: as `families_with` gives them.
        shapes: rows and columns of each layer, by the file's names.
        header: metadata of the file.
        config: PEFT's settings of the file, which may name a base model; empty where there are none.
    Returns:
        One family where that is clear, several where it is open, none where the header names an unknown model.
    """
    said = next(_said(header, config), None)
    if said == "":
        return ()
    if len(families) > 1 and said in families:
        return (said,)
    if len(families) == 1:
        return families
    widths = {side for shape in shapes.values() for side in shape}
    return tuple(f for f in families if any(width in widths for width, _ in SIZES.get(f, ()))) or families


def _said(header: Mapping[str, str], config: Mapping[str, object]) -> Iterator[str]:
    """Families that a file's header and PEFT's settings name, the most reliable first; empty for a foreign model."""
    try:
        own = json.loads(header.get("ngrpo", "{}"))
    except ValueError:
        own = None
    if isinstance(own, dict) and str(own.get("family")) in NAMES:
        yield own["family"]
    texts = [*map(header.get, WORDS), *map(config.get, SETTINGS)]
    for text in filter(None, texts):
        yield from [family for form, family in HEADERS if re.search(form, str(text).lower())][:1]


def _has_shapes(family: str, shapes: Shapes) -> bool:
    """Whether one width explains the shapes of all layers whose shape a family fixes, and its depth their numbers."""
    widths, last = set(), -1
    for name, (out, columns) in shapes.items():
        parts = diffusers_names(name, family)
        factors = [found for part in parts if (found := _factors(part, family))]
        if factors and len(factors) == len(parts):
            widths |= {out / sum(rows for rows, _ in factors), columns / factors[0][1]}
        last = max([last, *(int(n) for part in parts for n in re.findall(r"^transformer_blocks\.(\d+)", part))])
    depths = [depth for width, depth in SIZES.get(family, ()) if width in widths]
    return len(widths) <= 1 and all(last < depth for depth in depths)


def _factors(layer: str, family: str) -> tuple[int, int] | None:
    forms = WIDTHS.get(family, {}).items()
    return next((factors for form, factors in forms if re.search(rf"(^|\.)(?:{form})$", layer)), None)
