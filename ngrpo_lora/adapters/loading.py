"""Puts a LoRA file on a model with diffusers' own loader, after a check that it fits."""

from __future__ import annotations

import math
from pathlib import Path

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.reading import AdapterFile, check_fits, log_warnings, read_adapter_file
from ngrpo_lora.adapters.writing import state_dict
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models._base import BaseFamily


def read_fitting(family: BaseFamily, path: str | Path) -> AdapterFile:
    """Read a LoRA file of any trainer whose layers this model has.

    Raises:
        UserError: the file holds no LoRA, or one of another model.
    """
    name = type(family).__module__.rpartition(".")[2]
    file = read_adapter_file(path, name)
    check_fits(file, family.transformer, name)
    log_warnings(file)
    return file


def load_adapter(family: BaseFamily, path: str | Path, strength: float, name: str = lora.ADAPTER_NAME) -> None:
    """Put a LoRA file of any trainer on the model and make it the active adapter.

    Args:
        strength: 1 draws as trained, 0 draws the base.
        name: what PEFT calls the adapter on this model.
    Raises:
        UserError: as `read_fitting`, or the strength is not finite.
    """
    if not math.isfinite(strength):
        raise ConfigError(f"the strength of an adapter must be finite, got {strength}; 1 is as trained, 0 the base")
    layers = read_fitting(family, path).layers
    with lora.beside_another():
        family.pipeline.load_lora_weights(state_dict(layers), adapter_name=name)
    family.pipeline.set_adapters(name, strength)
