"""Whose a file is, by the names and sizes of its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_files import renamed
from safetensors.torch import save_file
from tiny_transformers import MAKERS, make, random_layers

from ngrpo_lora.adapters.reading import Layer, read_adapter_file


@pytest.mark.parametrize("family", MAKERS)
def test_a_file_with_feed_forward_layers_needs_no_header_to_be_known(family: str, tmp_path: Path):
    layers = random_layers(family, make(family))
    save_file(renamed(layers, "transformer.{}.lora_{}.weight"), tmp_path / "x.safetensors")
    ambiguous = {"sd3": (None, "flux", "sd3")}  # its layers' names are those of FLUX.1's double blocks
    assert read_adapter_file(tmp_path / "x.safetensors").family in ambiguous.get(family, (family,))


@pytest.mark.parametrize(
    ("width", "blocks", "family"),
    [
        (3072, 19, "flux"),
        (3072, 5, "flux2_klein"),
        (4096, 8, "flux2_klein"),
        (3072, 60, "qwen_image"),
        (1536, 24, "sd3"),
        (2432, 38, "sd3"),
    ],
)
def test_attention_alone_is_told_apart_by_width_and_number_of_blocks(
    width: int, blocks: int, family: str, tmp_path: Path
):
    layers = {
        f"transformer_blocks.{block}.attn.to_q": Layer(torch.ones(1, width), torch.ones(width, 1))
        for block in range(blocks)
    }
    save_file(renamed(layers, "transformer.{}.lora_{}.weight"), tmp_path / "x.safetensors")
    assert read_adapter_file(tmp_path / "x.safetensors").family == family
