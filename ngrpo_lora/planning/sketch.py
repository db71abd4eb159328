"""What a model weighs and what its passes cost, counted on the meta device by the family's own code."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ngrpo_lora.adapters import lora
from ngrpo_lora.config import LoraConfig, ModelConfig
from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.models._blueprint import TRANSFORMERS, Blueprint, blank_text, make_family, read_blueprint
from ngrpo_lora.models._offload import blocks_of
from ngrpo_lora.planning.meter import Meter, attention_on_meta, thin
from ngrpo_lora.planning.repeats import counting_repeats

__all__ = ["Cost", "Sketch", "packed_size", "sketch"]


@dataclass(frozen=True)
class Cost:
    """Cost of one pass: most bytes alive at once that were not there before, and FLOPs."""

    peak: int
    flops: int


class Sketch:
    """A model's transformers, one of them with its adapter, and its VAE: sizes in bytes, and costs of passes.

    weights, vae: bytes of all transformers, and of the VAE. parameters: those of each transformer by its name.
    blocks: bytes of the blocks of each transformer, that of the adapter first. linear: layers that a quantiser packs.
    adapted: the layers with a LoRA. lora: elements of every LoRA weight.
    """

    def __init__(self, blueprint: Blueprint, config: ModelConfig, lora_config: LoraConfig):
        self.blueprint = blueprint
        self.family: BaseFamily = make_family(blueprint, config)
        transformer, transformers = self.family.transformer, self.family.transformers
        self.weights, self.vae = sum(map(size_of, transformers)), size_of(self.family.vae)
        self.blocks = [[size_of(block) for block in blocks_of(one)] for one in transformers]
        named = {name: getattr(self.family.pipeline, name) for name in TRANSFORMERS if name in blueprint.parts}
        self.parameters = {name: sum(weight.numel() for weight in one.parameters()) for name, one in named.items()}
        self.linear = [layer for one in transformers for layer in packed_layers(one)]
        self.adapted = adapted_layers(self.family, lora_config.targets)
        self.lora = [elements for layer in self.adapted for elements in lora_sizes(layer, lora_config.rank)]
        self.counts = thin(transformer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers to leave out that are in no block that is left
            lora.inject(transformer, lora_config, *self.family.lora_targets(lora_config.targets), seed=0)
        self.velocities: dict[tuple[int, bool, bool], Cost] = {}
        self.decodings: dict[tuple[int, bool], Cost] = {}

    @property
    def passes(self) -> int:
        """Passes of the transformer for one velocity: 2 with guidance by two passes, else 1."""
        return 2 if self.family.guided else 1

    def velocity(self, batch: int, backward: bool = False, checkpointing: bool = False) -> Cost:
        """Cost of velocities for `batch` samples, and of the backward pass to an adapter that has its gradients."""
        key = (batch, backward, checkpointing)
        if key not in self.velocities:
            family, transformer = self.family, self.family.transformer
            family.negative, text = blank_text(family, 1), blank_text(family, batch)
            if checkpointing:
                transformer.enable_gradient_checkpointing()
            else:
                transformer.disable_gradient_checkpointing()
            for weight in lora.parameters(transformer).values():
                weight.grad = torch.zeros_like(weight)
            latents = self.blank_latents(batch)
            with attention_on_meta(), Meter(self.counts) as meter, torch.set_grad_enabled(backward):
                velocity = family.velocity(latents, family.probe_sigma, text)
                if backward:
                    velocity.sum().backward()
            self.velocities[key] = Cost(meter.peak, meter.flops)
        return self.velocities[key]

    def decode(self, batch: int, tiling: bool) -> Cost:
        """Cost of decoding the latents of `batch` samples to pictures."""
        key = (batch, tiling)
        if key not in self.decodings:
            vae = self.family.vae
            (vae.enable_tiling if tiling else vae.disable_tiling)()
            latents = self.blank_latents(batch)
            decoder = getattr(vae, "decoder", None)
            with attention_on_meta(), Meter() as meter, counting_repeats(decoder, meter):
                self.family.decode(latents)
            self.decodings[key] = Cost(meter.peak, meter.flops)
        return self.decodings[key]

    def blank_latents(self, batch: int) -> Tensor:
        """(B, C, H, W) or (B, C, F, H, W) latents on the meta device, without contents."""
        return torch.zeros(batch, *self.family.latent_shape, device="meta")

    def quantized(self, kind: str) -> int:
        """Bytes of the transformers' weights under a `model.quantization`; for `none` those in its number type."""
        if kind == "none":
            return self.weights
        plain = sum(layer.weight.nbytes for layer in self.linear)
        packed = sum(packed_size(layer.weight.numel(), layer.out_features, kind) for layer in self.linear)
        return self.weights - plain + packed


def packed_layers(transformer: Any) -> Iterator[nn.Linear]:
    """The linear layers that a quantiser packs: all but those that stay in float32."""
    in_float32 = transformer._keep_in_fp32_modules or []
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and not any(part in in_float32 for part in name.split(".")):
            yield module


def size_of(module: nn.Module) -> int:
    """Bytes of the weights and buffers of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def packed_size(elements: int, rows: int, kind: str) -> int:
    """Bytes of a quantised weight and of what it is unpacked with.

    NF4 has an 8-bit scale for 64 elements, a float32 one for 256 of these, an offset and two tables; all else has one
    byte an element and a float32 scale a row.
    """
    if kind != "nf4":
        return elements + 4 * rows
    scales = -(-elements // 64)
    return -(-elements // 2) + scales + 4 * (-(-scales // 256) + 1 + 16 + 256)


def adapted_layers(family: BaseFamily, targets: str) -> list[nn.Linear | nn.Conv2d]:
    """The layers to which `adapters.lora.inject` adds a LoRA."""
    suffixes, excluded = family.lora_targets(targets)
    endings = tuple(f".{suffix}" for suffix in suffixes)
    return [
        module
        for name, module in family.transformer.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and f".{name}".endswith(endings) and name not in excluded
    ]


def lora_sizes(layer: nn.Linear | nn.Conv2d, rank: int) -> Iterable[int]:
    """Elements of a layer's two LoRA weights."""
    outputs, *inputs = layer.weight.shape
    return rank * math.prod(inputs), rank * outputs


def sketch(config: ModelConfig, lora_config: LoraConfig) -> Sketch:
    """Sketch a configured model, once for all configurations that differ only in what does not change it.

    Raises:
        UserError: no such model, or it cannot be reached and the package does not know it.
    """
    plain = {"quantization": "none", "swap_blocks": 0, "compile": False, "text_encoders": "keep", "device": "cpu"}
    needed = config.model_copy(update={**plain, "vae_tiling": False, "attention": None, "fuse": {}})
    return sketch_once(needed.model_dump_json(), lora_config)


@lru_cache(maxsize=64)
def sketch_once(model: str, lora_config: LoraConfig) -> Sketch:
    """The sketch of a model's configuration in JSON."""
    config = ModelConfig.model_validate_json(model)
    return Sketch(read_blueprint(config), config, lora_config)
