"""LoRA files of every format: how others write them, and what they do in stock diffusers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import make, output, pipeline_of
from torch import Tensor

from ngrpo_lora.adapters.layers import NAMES
from ngrpo_lora.adapters.reading import Layer, read_metadata
from ngrpo_lora.adapters.writing import peft_metadata, save_tensors, state_dict


def header(family: str) -> dict[str, str]:
    return {"ss_base_model_version": {"qwen_image": "qwen", "flux2_klein": "flux_2_klein_4b"}.get(family, family)}


def write(path: Path, layers: dict[str, Layer], family: str) -> Path:
    """As the trainer does."""
    save_tensors(path, state_dict(layers), header(family) | {"lora_adapter_metadata": peft_metadata(layers)})
    return path


def renamed(layers: dict[str, Layer], form: str) -> dict[str, Tensor]:
    """lora_A and lora_B, unfolded, with `form` around the layer's name."""
    tensors = {}
    for name, layer in layers.items():
        tensors[form.format(name, "A")] = layer.down
        tensors[form.format(name, "B")] = layer.up
    return tensors


def kohya(layers: dict[str, Layer], family: str, alpha: float, path: Path) -> Path:
    """As sd-scripts and musubi-tuner write it: any alpha, dense matrices."""
    tensors: dict[str, Tensor] = {}
    for form, parts in NAMES[family].items():
        for block in range(2):
            found = [layers[name] for part in parts if (name := part.format(block)) in layers]
            if len(found) == len(parts):
                name = "lora_unet_" + form.format(block).replace(".", "_")
                tensors[f"{name}.lora_down.weight"] = found[0].down
                tensors[f"{name}.lora_up.weight"] = torch.cat([layer.up for layer in found])
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, header(family) | {"ss_network_dim": "2", "ss_network_alpha": str(alpha)})
    return path


def flux1_layers() -> dict[str, Layer]:
    """Of FLUX.1's true width, one block of each kind."""
    attention = ["to_q", "to_k", "to_v"]
    sides = {f"transformer_blocks.3.attn.{name}": (3072, 3072) for name in [*attention, "to_out.0", "to_add_out"]}
    sides |= {f"transformer_blocks.3.attn.add_{name}_proj": (3072, 3072) for name in "qkv"}
    sides |= {f"transformer_blocks.3.{ff}.net.0.proj": (12288, 3072) for ff in ("ff", "ff_context")}
    sides |= {f"transformer_blocks.3.{ff}.net.2": (3072, 12288) for ff in ("ff", "ff_context")}
    sides |= {f"single_transformer_blocks.17.attn.{name}": (3072, 3072) for name in attention}
    sides |= {"single_transformer_blocks.17.proj_mlp": (12288, 3072)}
    sides |= {"single_transformer_blocks.17.proj_out": (3072, 15360)}
    torch.manual_seed(0)
    return {name: Layer(torch.randn(2, columns), torch.randn(rows, 2)) for name, (rows, columns) in sides.items()}


def rewrite(adapter: Path, path: Path, factor: float = 1.0, **metadata: str) -> Path:
    """A copy whose lora_B are scaled, with other metadata."""
    tensors = {name: tensor * factor if ".lora_B." in name else tensor for name, tensor in load_file(adapter).items()}
    save_file(tensors, path, read_metadata(adapter) | metadata)
    return path


# What they do -------------------------------------------------------------------------------------------------------


def merged_output(family: str, layers: dict[str, Layer]) -> Tensor:
    """With the weights themselves changed: no loader of anybody's."""
    transformer = make(family)
    for name, layer in layers.items():
        weight = transformer.get_submodule(name).weight
        weight += layer.delta().view_as(weight)
    return output(family, transformer)


def loaded_output(family: str, file: Path | dict[str, Tensor]) -> Tensor:
    """With stock diffusers."""
    transformer = make(family)
    pipeline_of(family, transformer).load_lora_weights(file)
    return output(family, transformer)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def effect(tensors: dict[str, Tensor], name: str) -> Tensor:
    """On three fixed inputs."""
    up, down = (tensors[f"transformer.{name}.lora_{part}.weight"].double() for part in "BA")
    inputs = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(0)).double()
    return up @ (down @ inputs)


def same_layers(actual: dict[str, Layer], expected: dict[str, Layer], tolerance: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, layer in expected.items():
        assert relative_error(actual[name].delta(), layer.delta()) <= tolerance, name
