"""Nested state as two things that any program reads: its tensors by name, and the rest as JSON that names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["join", "memory_of", "split"]

PLAIN = (str, int, float, bool, type(None))


def memory_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """A key that tensors share which are the same memory in the same shape; None of one without elements."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device) if tensor.numel() else None


def split(nested: Any) -> tuple[Any, dict[str, Tensor]]:
    """Nested dictionaries, lists, tuples, tensors and plain values as a tree of JSON and its tensors by name.

    In the tree `{"tensor": name}` stands for a tensor, `{"dict": [[key, value], ...]}` for a dictionary, whose keys
    may be numbers, and `{"list": [...]}` for a list or tuple. A tensor that is there twice has one name.

    Raises:
        TypeError: the state holds something else.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            name = names.setdefault(memory_of(value) or path, ".".join(path) or "value")
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": [[key, walk(item, (*path, str(key)))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"list": [walk(item, (*path, str(index))) for index, item in enumerate(value)]}
        if not isinstance(value, PLAIN):
            raise TypeError(f"{'.'.join(path)} is a {type(value).__name__}, which a checkpoint cannot hold")
        return value

    return walk(nested, ()), tensors


def join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nested state that `split` has taken apart; tuples come back as lists."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: join(value, tensors) for key, value in content}
    return [join(value, tensors) for value in content]
