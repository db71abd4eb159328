"""Every layer of every family in every naming: read, written, and what stock diffusers makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from lora_files import relative_error, same_layers, write
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_transformers import MAKERS, adaptable, complete, pipeline_of
from torch import Tensor

from ngrpo_lora.adapters.layers import EXCHANGED
from ngrpo_lora.adapters.namings import NAMINGS, READERS, Naming, cells, left_out
from ngrpo_lora.adapters.reading import Layer, read_adapter_file
from ngrpo_lora.adapters.writing import Format, convert, save_tensors

CELLS = [pytest.param(naming, family, id=f"{naming.name}-{family}") for naming in NAMINGS for family in naming.families]

Key = tuple[dict[str, Tensor], dict[str, Layer]]
"""Tensors of one key's matrices, and the diffusers layers that they stand for."""


shapes_of = cache(lambda family: adaptable(complete(family)))


def keys(naming: Naming, family: str) -> list[Key]:
    """One random LoRA for every layer that a complete transformer has, as a trainer of this naming writes them."""
    torch.manual_seed(0)
    shapes, found = shapes_of(family), {}
    for original, forms in naming.layers(family).items():
        for number in "01":
            named = naming.keys(original.replace("{}", number), [form.replace("{}", number) for form in forms])
            for key, parts in named.items():
                if all(part in shapes for part in parts):
                    swapped = "{diffusers" not in naming.key and original in EXCHANGED.get(family, ())
                    found[key] = one(key, parts, shapes, swapped)
    return [*found.values()]


def one(key: str, parts: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], swapped: bool) -> Key:
    """A pair of matrices over the rows of all parts."""
    rows, (_, *columns) = [shapes[part][0] for part in parts], shapes[parts[0]]
    down, up = torch.randn(2, *columns), torch.randn(sum(rows), 2, *[1] * len(columns[1:]))
    tensors = {key: down, key.replace("lora_A", "lora_B").replace("down", "up"): up}
    if "lora_down" in key:
        tensors[key.replace("lora_down.weight", "alpha")] = torch.tensor(1.0)
        up = up / 2
    if swapped and sum(rows) == 2 * columns[0]:
        up = torch.cat([*up.chunk(2)][::-1])
    return tensors, {part: Layer(down.clone(), ups) for part, ups in zip(parts, up.split(rows), strict=True)}


def file_of(found: list[Key], path: Path) -> Path:
    save_file({key: tensor.contiguous() for tensors, _ in found for key, tensor in tensors.items()}, path)
    return path


def names_in(found: list[Key]) -> set[str]:
    return {key for tensors, _ in found for key in tensors}


def layers_of(found: list[Key]) -> dict[str, Layer]:
    return {name: layer for _, layers in found for name, layer in layers.items()}


def added_by_diffusers(family: str, path: Path) -> dict[str, Tensor]:
    """What stock diffusers adds to each layer's weight; nothing where it refuses the file."""
    transformer = complete(family)
    try:
        pipeline_of(family, transformer).load_lora_weights(path)
    except (AssertionError, IndexError, KeyError, RuntimeError, ValueError):
        return {}
    adapted: dict[str, Any] = {name: m for name, m in transformer.named_modules() if isinstance(m, LoraLayer)}
    return {name: module.get_delta_weight("default_0").flatten(1) for name, module in adapted.items()}


def is_taken(added: Mapping[str, Tensor], name: str, layer: Layer) -> bool:
    return name in added and relative_error(added[name], layer.delta()) <= 1e-6


@pytest.mark.parametrize(("naming", "family"), CELLS)
def test_every_layer_is_read(naming: Naming, family: str, tmp_path: Path):
    found = keys(naming, family)
    file = read_adapter_file(file_of(found, tmp_path / "x.safetensors"), family)
    same_layers(file.layers, layers_of(found))
    if naming.name != "XLabs":  # which has no modulation and no embedders
        assert file.layers.keys() == shapes_of(family).keys()
    alike = [
        other for other in NAMINGS if family in other.families and names_in(keys(other, family)) == names_in(found)
    ]
    assert file.naming == alike[0].name  # Qwen-Image's original names are diffusers'


@pytest.mark.parametrize(("naming", "family"), CELLS)
def test_diffusers_takes_the_layers_that_it_is_said_to_take_and_no_others(naming: Naming, family: str, tmp_path: Path):
    found = keys(naming, family)
    if (naming.key.count("original"), family, "down.weight" in naming.key) == (1, "flux", True):
        # Of a narrow FLUX.1 it cannot split these; tests/adapters/test_reading.py has them in its true width.
        found = [(tensors, layers) for tensors, layers in found if not any(name.endswith("mlp") for name in layers)]
    lacks = {*left_out("diffusers", naming.name, family, layers_of(found))}
    taken = [(tensors, layers) for tensors, layers in found if not lacks & layers.keys()]
    if taken:
        added = added_by_diffusers(family, file_of(taken, tmp_path / "taken.safetensors"))
        assert [name for name, layer in layers_of(taken).items() if not is_taken(added, name, layer)] == []
    known = family in READERS["diffusers"].get(naming.name, {})
    for rest in [[key] for key in found if lacks & key[1].keys()] if known else [found]:
        added = added_by_diffusers(family, file_of(rest, tmp_path / "rest.safetensors"))
        assert [name for name, layer in layers_of(rest).items() if is_taken(added, name, layer)] == []


REFUSED_OF_KOHYA = {  # as diffusers would refuse the file: it splits FLUX.1's true width alone, and reads Wan's blocks
    "flux": r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)",
    "wan": r"(?!blocks\.).*",
}


def converted(layers: dict[str, Layer], family: str, form: Format, folder: Path) -> Path:
    source = write(folder / "source.safetensors", layers, family)
    save_tensors(folder / "converted.safetensors", *convert(read_adapter_file(source, family), form))
    return folder / "converted.safetensors"


@pytest.mark.parametrize(
    ("family", "form", "naming"),
    [(cell["family"], cell["written"], cell["naming"]) for cell in cells() if cell["written"]],
)
def test_every_layer_is_written_where_a_format_is(family: str, form: Format, naming: str, tmp_path: Path):
    """The way back: the same names, and the same effect in diffusers of all layers that it reads."""
    (of_naming,) = [one for one in NAMINGS if one.name == naming]
    expected = keys(of_naming, family)
    refused = REFUSED_OF_KOHYA.get(family, "") if form == "kohya" else ""
    layers = {name: layer for name, layer in layers_of(expected).items() if not re.fullmatch(refused, name)}
    path = converted(layers, family, form, tmp_path)
    same_layers(read_adapter_file(path, family).layers, layers)
    assert {*load_file(path)} <= names_in(expected)
    lacks = left_out("diffusers", naming, family, layers)
    if not (read := {name: layer for name, layer in layers.items() if name not in lacks}):
        return  # as of HunyuanVideo 1.5 in ComfyUI's names; tests/comfy/test_places.py has it there
    added = added_by_diffusers(family, converted(read, family, form, tmp_path))
    assert [name for name, layer in read.items() if not is_taken(added, name, layer)] == []


def test_the_command_prints_every_cell():
    said = json.loads("\n".join(run("formats", "--json")))
    assert [(one["naming"], one["family"]) for one in said] == [
        (naming.name, family) for naming in NAMINGS for family in naming.families
    ]
    shown = [line.split() for line in run("formats")]
    head = next(line for line in shown if line[:1] == ["naming"])
    assert head[2:10] == [*MAKERS]
    (kohya,) = [line for line in shown if line[:1] == ["kohya"] and "lora_unet_{original_}.lora_down.weight" in line]
    assert kohya[2:10] == ["RWdC", "RWdC", "RC", "RWDC", "R", "RC", "RWdC", "RWdC"]
    lacking = next(" ".join(line) for line in shown if line[-1:] == ["kohya"] and line[:2] == ["flux", "diffusers"])
    assert "time_text_embed, x_embedder, context_embedder, norm_out, proj_out" in lacking
