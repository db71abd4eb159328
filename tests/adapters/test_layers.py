"""The tables of layers: none is missing, and each lies where diffusers' own converters of checkpoints put it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from tiny_transformers import MAKERS, adaptable, complete
from torch import Tensor

from ngrpo_lora.adapters.layers import NAMES
from ngrpo_lora.adapters.names import BLOCK_NUMBER
from ngrpo_lora.adapters.reading import read_adapter_file

CONVERTERS: dict[str, Callable[..., dict[str, Any]]] = {
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2_klein": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "sana": single_file_utils.convert_sana_transformer_to_diffusers,
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
}
"""Of Qwen-Image there is none, since its original code has diffusers' names."""


class Checkpoint(dict[str, Tensor]):
    """Weights of layers; what else a converter asks for, such as biases, is zeros that can be split in any way."""

    def pop(self, key: str, *_: Any) -> Tensor:
        return super().pop(key, torch.zeros(7 * 3072, 1))


@pytest.mark.parametrize("family", MAKERS)
def test_no_layer_of_a_family_is_missing_and_none_is_made_up(family: str):
    layers = {re.sub(BLOCK_NUMBER, "{}", name) for name in adaptable(complete(family))}
    assert {part for parts in NAMES[family].values() for part in parts} == layers


def originals(family: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the original layers of a complete transformer, in FLUX.1 with the width that its converter expects."""
    shapes = adaptable(complete(family))
    found = {}
    for original, forms in NAMES[family].items():
        for number in "01":
            parts = [form.replace("{}", number) for form in forms]
            if all(part in shapes for part in parts):
                rows = sum(shapes[part][0] for part in parts)
                wide = family == "flux" and original.endswith("linear1")
                found[original.replace("{}", number)] = (7 * 3072 if wide else rows, *shapes[parts[0]][1:])
    return found


@pytest.mark.parametrize("family", CONVERTERS)
def test_every_original_layer_is_read_as_diffusers_converts_a_checkpoint(family: str, tmp_path: Path):
    torch.manual_seed(0)
    tensors, checkpoint = {}, Checkpoint()
    for name, (rows, *columns) in originals(family).items():
        down, up = torch.randn(2, *columns), torch.randn(rows, 2, *[1] * len(columns[1:]))
        tensors |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        checkpoint[f"{name}.weight"] = (up.flatten(1) @ down.flatten(1)).view(rows, *columns)
    save_file(tensors, tmp_path / "x.safetensors")
    layers = read_adapter_file(tmp_path / "x.safetensors", family).layers
    expected = CONVERTERS[family](checkpoint)
    assert layers.keys() == adaptable(complete(family)).keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.delta(), expected[f"{name}.weight"].flatten(1), rtol=1e-6, atol=1e-6)
