"""Names of a model's layers in diffusers, and in the original code that kohya's trainers and ComfyUI follow.

An original layer may be several of diffusers' side by side (queries, keys and values as one `qkv`); they are listed in
the order of its rows. Sources: diffusers' `loaders/lora_conversion_utils.py`, and which keys ComfyUI asks for
(`comfy/lora.py`): for every model `diffusion_model.` or `lora_unet_` and the original name, for FLUX.1, FLUX.2, SD3,
Qwen-Image and Z-Image also `transformer.` and diffusers' name. For Wan it knows only the former; Sana it does not run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

__all__ = ["FORMATS", "KOHYA_PREFIX", "NAMES", "NATIVE_FORMATS", "diffusers_names", "guess_family", "original_rows"]

FORMATS: dict[str, tuple[str, ...]] = {
    "flux": ("diffusers", "comfyui", "kohya"),
    "flux2_klein": ("diffusers", "comfyui", "kohya"),
    "qwen_image": ("diffusers", "comfyui", "kohya"),
    "sana": ("diffusers",),
    "sd3": ("diffusers", "comfyui"),
    "wan": ("diffusers", "comfyui", "kohya"),
    "z_image": ("diffusers", "comfyui", "kohya"),
}
"""The formats that each family's readers understand. ComfyUI reads SD3 in kohya's names, diffusers does not."""

NATIVE_FORMATS = ("wan",)
"""Families for which ComfyUI has no map of diffusers' names."""

KOHYA_PREFIX = "lora_unet_"
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")

Names = dict[str, tuple[str, ...]]
"""Each original layer, with `{}` for the number of its block, and the diffusers layers that it consists of."""


def _blocks(original: str, diffusers: str, layers: Mapping[str, str]) -> Names:
    return {
        f"{original}{name}": tuple(f"{diffusers}{part}" for part in parts.split()) for name, parts in layers.items()
    }


def _same(blocks: str, layers: str) -> Names:
    """Names of layers that are called the same in diffusers and in the original code."""
    return {f"{blocks}{name}": (f"{blocks}{name}",) for name in layers.split()}


_FLUX_ATTENTION = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn.proj": "attn.to_add_out",
}
_SD3_BLOCK = {
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
_Z_IMAGE_BLOCK = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
}
_JOINT = "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out"

NAMES: dict[str, Names] = {  # by family
    "flux": {
        **_blocks(
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            _FLUX_ATTENTION
            | {
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "img_mod.lin": "norm1.linear",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
                "txt_mod.lin": "norm1_context.linear",
            },
        ),
        **_blocks(
            "single_blocks.{}.",
            "single_transformer_blocks.{}.",
            {
                "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
                "linear2": "proj_out",
                "modulation.lin": "norm.linear",
            },
        ),
        **_blocks(
            "",
            "",
            {
                "img_in": "x_embedder",
                "txt_in": "context_embedder",
                "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
                "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
                "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
                "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
                "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
                "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
                "final_layer.linear": "proj_out",
            },
        ),
    },
    "flux2_klein": {
        **_blocks(
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            _FLUX_ATTENTION
            | {
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
            },
        ),
        **_blocks(
            "single_blocks.{}.",
            "single_transformer_blocks.{}.attn.",
            {"linear1": "to_qkv_mlp_proj", "linear2": "to_out"},
        ),
        **_blocks("", "", {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}),
    },
    "qwen_image": {
        **_same("transformer_blocks.{}.", f"{_JOINT} img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj"),
        **_same("transformer_blocks.{}.", "txt_mlp.net.2 img_mod.1 txt_mod.1"),
        **_same("", "img_in txt_in proj_out norm_out.linear"),
    },
    "sana": {
        **_same("transformer_blocks.{}.attn1.", "to_q to_k to_v to_out.0"),
        **_same("transformer_blocks.{}.attn2.", "to_q to_k to_v to_out.0"),
        **_same("transformer_blocks.{}.ff.", "conv_inverted conv_depth conv_point"),
    },
    "sd3": _blocks("joint_blocks.{}.", "transformer_blocks.{}.", _SD3_BLOCK)
    | _blocks("", "", {"context_embedder": "context_embedder", "final_layer.linear": "proj_out"}),
    "wan": {
        **_blocks("blocks.{}.self_attn.", "blocks.{}.attn1.", {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}),
        **_blocks(
            "blocks.{}.cross_attn.", "blocks.{}.attn2.", {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
        ),
        **_blocks("blocks.{}.cross_attn.", "blocks.{}.attn2.", {"k_img": "add_k_proj", "v_img": "add_v_proj"}),
        **_blocks("blocks.{}.ffn.", "blocks.{}.ffn.", {"0": "net.0.proj", "2": "net.2"}),
        **_blocks(
            "",
            "condition_embedder.",
            {
                "text_embedding.0": "text_embedder.linear_1",
                "text_embedding.2": "text_embedder.linear_2",
                "time_embedding.0": "time_embedder.linear_1",
                "time_embedding.2": "time_embedder.linear_2",
                "time_projection.1": "time_proj",
            },
        ),
        **_blocks("", "", {"head.head": "proj_out"}),
    },
    "z_image": {
        **_blocks("layers.{}.", "layers.{}.", _Z_IMAGE_BLOCK),
        **_blocks("noise_refiner.{}.", "noise_refiner.{}.", _Z_IMAGE_BLOCK),
        **_blocks("context_refiner.{}.", "context_refiner.{}.", _Z_IMAGE_BLOCK),
        **_same("", "cap_embedder.1 t_embedder.mlp.0 t_embedder.mlp.2"),
    },
}

SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "flux": ((3072, 19),),
    "flux2_klein": ((3072, 5), (4096, 8)),
    "qwen_image": ((3072, 60),),
    "sd3": ((1536, 24), (2432, 38)),
}
"""(width, number of joint blocks) of the published models, for families that name their attention layers alike."""

HEADERS = (
    (r"flux[._-]?2", "flux2_klein"),
    (r"flux", "flux"),
    (r"qwen", "qwen_image"),
    (r"z[_-]?image|lumina", "z_image"),
    (r"wan", "wan"),
    (r"sana", "sana"),
    (r"stable-diffusion-v?3|^sd_?3|^3(\.5)?-|3-5-", "sd3"),
)
"""Patterns of `modelspec.architecture` and `ss_base_model_version` with their family; the first that fits counts."""


def diffusers_names(name: str, family: str | None) -> tuple[str, ...]:
    """The diffusers layers that a file's key stands for, such as `lora_unet_double_blocks_3_img_attn_qkv`.

    Names with dots that are in no table are diffusers' own: they are returned without their prefix. The result is empty
    for a name with underscores that is unknown.
    """
    original, diffusers = _tables(family)
    for prefix in (KOHYA_PREFIX, "lora_transformer_"):
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            return _look_up(flat, original, flat=True) or _look_up(flat, diffusers, flat=True)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return _look_up(name, original) or (name,)


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


def guess_family(names: Mapping[str, tuple[int, ...]], header: Mapping[str, str]) -> str | None:
    """The family whose layers a file adapts, None where it is not clear.

    Layer names decide; where they fit several families, the header does, and after it the sizes.

    Args:
        names: the file's names for layers, with the widths of each.
        header: metadata of the file.
    """
    known = {family: sum(_is_known(name, family) for name in names) for family in NAMES}
    most = max(known.values())
    found = [family for family, count in known.items() if count == most > 0]
    if len(found) > 1:
        said = [header.get(key, "").lower() for key in ("modelspec.architecture", "ss_base_model_version")]
        named = next((family for text in said for form, family in HEADERS if re.search(form, text)), None)
        found = [named] if named in found else _by_size(found, names)
    return found[0] if len(found) == 1 else None


def _is_known(name: str, family: str) -> bool:
    """Whether a family has all the diffusers layers that a file's key stands for."""
    diffusers = _tables(family)[1]
    layers = diffusers_names(name, family)
    return bool(layers) and all(_look_up(layer, diffusers) for layer in layers)


def _by_size(families: list[str], names: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The family of the smallest published model with such a width and so many joint blocks; all where none fits."""
    joint = {name: shape for name, shape in names.items() if re.search(r"(double|transformer|joint)_blocks", name)}
    last = max((int(number) for name in joint for number in re.findall(r"\d+", name)[:1]), default=-1)
    widths = {side for shape in joint.values() for side in shape}
    fits = [
        (depth, family)
        for family in families
        for width, depth in SIZES.get(family, ())
        if width in widths and last < depth
    ]
    return [min(fits)[1]] if fits else families


@cache
def _tables(family: str | None) -> tuple[Names, Names]:
    """A family's layers by original and by diffusers' names; both tables are empty for an unknown family."""
    original = NAMES.get(family or "", {})
    return original, {part: (part,) for parts in original.values() for part in parts}


def _look_up(name: str, table: Names, flat: bool = False) -> tuple[str, ...]:
    """The layers that a name stands for in a table; `flat` names have underscores in place of dots."""
    numbers = re.findall(r"(?<=blocks[._])\d+|(?<=layers[._])\d+|(?<=refiner[._])\d+", name)
    number = numbers[0] if numbers else ""
    for form, layers in table.items():
        if (form.replace(".", "_") if flat else form).replace("{}", number, 1) == name:
            return tuple(layer.replace("{}", number) for layer in layers)
    return ()
