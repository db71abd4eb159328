"""LoRA on a frozen transformer, with PEFT: inject, list, disable for the reference pass."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ngrpo_lora.adapters.reading import AdapterFile, examples
from ngrpo_lora.config import LoraConfig
from ngrpo_lora.errors import UserError

ADAPTER_NAME = "default"  # any other breaks PEFT's and diffusers' collation of adapter metadata


def inject(transformer: Any, config: LoraConfig, suffixes: list[str], excluded: list[str], seed: int) -> None:
    """Add a LoRA to every layer named by `suffixes`; its weights are float32 whatever the base is.

    Raises:
        UserError: no layer of this model has such a name.
    """
    # As a list PEFT would read the excluded names as suffixes too, and leave out every block's `proj_out`.
    exclude = "|".join(map(re.escape, excluded)) or None
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.resolved_alpha,  # pyright: ignore[reportArgumentType]  # annotated int, any number works
        target_modules=suffixes,
        exclude_modules=exclude,
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU
        torch.manual_seed(seed)
        try:
            transformer.add_adapter(peft_config, adapter_name=ADAPTER_NAME)
        except ValueError as error:
            raise UserError(f"lora.targets fits no layer of {type(transformer).__name__}: {error}") from error
    cast_training_params(transformer, torch.float32)


@torch.no_grad()
def start_from(transformer: nn.Module, file: AdapterFile, left_out: Sequence[str]) -> None:
    """Set the injected LoRA's weights so that it has the effect of a LoRA file.

    Ranks that the file does not have keep their random lora_A and a lora_B of zeros, as if just injected.

    Args:
        left_out: layers that are not adapted. Those within a block have no effect, so the file may hold them.
    Raises:
        UserError: the file adapts other layers of this model, has a higher rank, or more than matrices.
    """
    if more := [name for name, layer in file.layers.items() if layer.bias is not None or layer.magnitude is not None]:
        what = "biases" if file.layers[more[0]].magnitude is None else "the scales of a DoRA"
        raise UserError(
            f"lora.init_from {str(file.path)!r} has {what} beside its matrices ({examples(more)}), which are not "
            "trained here; give a plain LoRA"
        )
    own: dict[str, Any] = {name: m for name, m in transformer.named_modules() if isinstance(m, LoraLayer)}
    layers = {name: layer for name, layer in file.layers.items() if "." not in name or name not in left_out}
    if more := [name for name in layers if name not in own]:
        raise UserError(
            f"lora.init_from {str(file.path)!r} adapts {len(more)} layers that lora.targets leaves out "
            f"({examples(more)}); set lora.targets=attention+feed_forward, or give an adapter of blocks alone"
        )
    for name, layer in layers.items():
        down, up = (part[ADAPTER_NAME].weight for part in (own[name].lora_A, own[name].lora_B))
        if layer.rank > len(down):
            rank = max(layer.rank for layer in layers.values())
            raise UserError(
                f"lora.rank must be at least {rank}, that of lora.init_from {str(file.path)!r}, got {len(down)}"
            )
        down[: layer.rank] = layer.down
        up[:, : layer.rank] = layer.folded / own[name].scaling[ADAPTER_NAME]


def parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name: all that is ever trained."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def remove(transformer: Any, name: str) -> None:
    """Delete an adapter that was loaded beside the trained one, which becomes active and trainable again."""
    transformer.set_adapter(ADAPTER_NAME)
    if name in transformer.peft_config:
        transformer.delete_adapters(name)


def adapted_layers(module: nn.Module) -> list[Any]:
    """PEFT's layers in a module, in order; nothing within them is looked at, which `modules()` takes long for."""
    if isinstance(module, LoraLayer):
        return [module]
    return [layer for child in module.children() for layer in adapted_layers(child)]


def switch(transformer: nn.Module, on: bool) -> None:
    """Switch all adapters of a transformer, which may have none, on or off."""
    for layer in adapted_layers(transformer):
        layer.enable_adapters(on)


@contextlib.contextmanager
def disabled(transformer: nn.Module) -> Iterator[None]:
    """Switch the adapter off within the context, so that the model is exactly the base."""
    switch(transformer, False)
    try:
        yield
    finally:
        switch(transformer, True)


@contextlib.contextmanager
def merged(transformer: Any) -> Iterator[None]:
    """Add the adapter into the base's weights within the context; they are restored bit for bit after it.

    Forward passes then cost what the base's do. Memory: a second copy of the adapted layers' weights. The sum is
    rounded to the base's number type, so in 16 bits outputs differ a little from those of the unmerged adapter.

    Raises:
        UserError: the base's weights are quantised.
    """
    layers = adapted_layers(transformer)
    base_layers: list[Any] = [layer.get_base_layer() for layer in layers]
    kept: list[torch.Tensor] = [base.weight.data for base in base_layers]
    if not all(weight.is_floating_point() for weight in kept):
        raise UserError("rollout.merge_adapter=true needs a base whose weights are not quantised; set it to false")
    try:
        with torch.no_grad():
            for layer, base, weight in zip(layers, base_layers, kept, strict=True):
                base.weight.data = (weight.float() + layer.get_delta_weight(ADAPTER_NAME)).to(weight.dtype)
                layer.merged_adapters.append(ADAPTER_NAME)  # PEFT calls the base's layer alone then
        yield
    finally:
        for layer, base, weight in zip(layers, base_layers, kept, strict=True):
            layer.merged_adapters.clear()
            base.weight.data = weight


@contextlib.contextmanager
def beside_another() -> Iterator[None]:
    """Allow a second adapter to be loaded within the context, without PEFT's warning that it might not be meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        yield


@contextlib.contextmanager
def swapped(transformer: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Use other adapter weights (an average, say) within the context, without gradients; restored bit for bit."""
    live = parameters(transformer)
    kept = {name: live[name].detach().clone() for name in weights}
    with torch.no_grad():
        for name, weight in weights.items():
            live[name].copy_(weight)
        try:
            yield
        finally:
            for name, weight in kept.items():
                live[name].copy_(weight)
