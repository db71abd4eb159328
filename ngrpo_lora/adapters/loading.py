"""Puts a LoRA file on a model with diffusers' own loader, after a check that it fits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from ngrpo_lora.adapters import lora
from ngrpo_lora.adapters.reading import AdapterFile, check_fits, log_warnings, read_adapter_file
from ngrpo_lora.adapters.writing import state_dict
from ngrpo_lora.config import Expert
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.models._base import BaseFamily

EXPERTS: dict[str, Expert] = {"high": "high_noise", "low": "low_noise"}


def read_fitting(family: BaseFamily, path: str | Path, tell: bool = True) -> AdapterFile:
    """Read a LoRA file of any trainer whose layers this model has.

    Args:
        tell: whether to log what the file does not say, and what of it is left out.
    Raises:
        UserError: the file holds no LoRA, or one of another model.
    """
    name = type(family).__module__.rpartition(".")[2]
    file = read_adapter_file(path, name)
    check_fits(file, family.transformer, name)
    if tell:
        log_warnings(file)
    return file


def read_initial(family: BaseFamily, path: str | Path, tell: bool = True) -> AdapterFile:
    """Read a LoRA file to start from (`lora.init_from`).

    Args:
        tell: as in `read_fitting`.
    Raises:
        UserError: as `read_fitting`, or it is for the transformer of a pair that is not trained.
    """
    file = read_fitting(family, path, tell)
    said = said_expert(file.path.name, file.metadata)
    if family.expert is not None and said not in (None, family.expert):
        raise ConfigError(
            f"lora.init_from {str(path)!r} is for {said}, got model.expert={family.expert}; give an adapter of that "
            f"transformer, or model.expert={said}"
        )
    return file


def expert_of(file: AdapterFile, family: BaseFamily) -> Expert | None:
    """The transformer of a pair that a LoRA file is for; None where the model has a single one.

    Raises:
        UserError: neither the file's header nor its name says it.
    """
    if family.expert is None:
        return None
    if (expert := said_expert(file.path.name, file.metadata)) is None:
        raise UserError(
            f"adapter {str(file.path)!r} must say which of the two transformers it is for, but neither its header nor "
            "its name does; write high_noise or low_noise into its name"
        )
    return expert


def said_expert(name: str, header: Mapping[str, str]) -> Expert | None:
    """The transformer that a file's own header names, else its name, as other trainers call theirs; None: neither."""
    own = json.loads(header.get("ngrpo", "{}")).get("model", {}).get("expert")
    found = re.search(r"(high|low)[-_ ]?noise", name.lower())
    return own or (found and EXPERTS[found[1]])


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
    file = read_fitting(family, path)
    with lora.beside_another():
        family.load_lora(state_dict(file.layers), name, expert_of(file, family))
    family.use_loras(name, strength)
