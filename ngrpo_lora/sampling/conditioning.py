"""ComfyUI's conditioning in a safetensors file and back, bit for bit.

Conditioning is a list of [states (1, L, C), {name: value}]; values are tensors, plain values, and lists, tuples and
mappings of these. Tensors are the file's, all else is JSON in its header; there is no pickle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ngrpo_lora.errors import ConfigError, UserError, first_line
from ngrpo_lora.records.files import written

__all__ = ["Conditioning", "load_conditioning", "save_conditioning"]

Conditioning = list[list[Any]]
KEY = "ngrpo_conditioning"
PLAIN = (bool, int, float, str, type(None))
STATES, POOLED = "prompt_embeds", "pooled_prompt_embeds"  # as diffusers has them


def save_conditioning(path: Path, conditioning: Conditioning) -> None:
    """Write conditioning to a safetensors file, whole or not at all.

    Raises:
        ConfigError: the conditioning holds what a file cannot, such as a ControlNet.
        UserError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    described = [[_describe(part, f"{row}", tensors) for part in one] for row, one in enumerate(conditioning)]
    try:
        with written(path) as partial:
            save_file(tensors, partial, {KEY: json.dumps(described)})
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror or error}") from None


def _describe(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Describe a value as JSON, and add its tensors to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors takes none that share memory
        return {"tensor": name}
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_describe(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _describe(part, f"{name}.{key}", tensors) for key, part in value.items()}}
    where = ".".join(name.split(".")[1:])
    raise ConfigError(
        f"conditioning must hold tensors and plain values to be saved, but {where} is a {type(value).__name__}; save "
        "before the node that adds it"
    )


def load_conditioning(path: Path) -> Conditioning:
    """Read what `save_conditioning` wrote, or `prompt_embeds` (1, L, C) with other tensors that a script saved.

    Raises:
        ConfigError: the file is neither.
    """
    wanted = "a file that Save Prompt Embeddings wrote, or a safetensors file with prompt_embeds"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path.name!r} must be {wanted}, but it cannot be read: {first_line(error)}") from None
    if KEY in metadata:
        try:
            rows = json.loads(metadata[KEY])
            return [[_restore(part, tensors) for part in one] for one in rows]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path.name!r} must be {wanted}, but its header is damaged") from None
    if STATES not in tensors or tensors[STATES].ndim != 3:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        raise ConfigError(f"{path.name!r} must be {wanted} (1, L, C), but it holds {found:.300}")
    states = tensors.pop(STATES)
    return [[states, {"pooled_output" if name == POOLED else name: tensor for name, tensor in tensors.items()}]]


def _restore(described: Any, tensors: dict[str, Tensor]) -> Any:
    """Make a value again from its description by `_describe`."""
    if not isinstance(described, dict):
        return described
    ((kind, value),) = described.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _restore(part, tensors) for key, part in value.items()}
    return {"list": list, "tuple": tuple}[kind](_restore(part, tensors) for part in value)
