"""Calls of a network that repeat themselves are walked twice and then counted: a video's frames cost one by one.

The VAE of Wan decodes frame by frame, with caches between. On the meta device a call is decided by the shapes that it
is given and those of its caches. Once two calls with the same shapes have cost the same and left the caches as they
were, the next one is neither walked nor guessed: it has the same cost from where it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ngrpo_lora.planning.meter import Meter, Part

__all__ = ["counting_repeats"]


@dataclass(frozen=True)
class Walked:
    """What a call has cost, and its output.

    steady: whether its arguments, with caches in them, have the same shapes after it as before.
    """

    part: Part
    shape: torch.Size
    dtype: torch.dtype
    steady: bool

    @property
    def can_stand_for_others(self) -> bool:
        """Whether nothing but the output is there after the call that was not there before."""
        return self.steady and self.part.left == self.shape.numel() * self.dtype.itemsize


@contextmanager
def counting_repeats(network: nn.Module | None, meter: Meter) -> Iterator[None]:
    """Walk calls of `network` only until they repeat themselves; peak and FLOPs of `meter` are those of all of them.

    Args:
        network: called without gradient on the meta device, with arguments that alone decide what it does; its output
            is one tensor. None: nothing is counted so.
    """
    if network is None:
        yield
        return
    last: dict[str, Walked] = {}
    known: dict[str, Walked] = {}
    walk: Callable[..., Any] = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        key = signature((args, kwargs))
        if (same := known.get(key)) is not None:
            meter.add(same.part)
            return torch.empty(same.shape, dtype=same.dtype, device="meta")
        with meter.part() as part:
            result = walk(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_meta and not result.requires_grad:
            steady = signature((args, kwargs)) == key
            found = Walked(part, result.shape, result.dtype, steady)
            if found.can_stand_for_others and last.get(key) == found:
                known[key] = found
            last[key] = found
        return result

    network.forward = forward
    try:
        yield
    finally:
        del network.forward  # the class's own is there again


def signature(arguments: Any) -> str:
    """Arguments in words, of tensors their shapes and number types: calls with the same ones cost the same.

    Counters in lists of one number, which a call moves on and its caller sets back, are left out.
    """

    def shown(value: Any) -> Any:
        return ("tensor", *value.shape, str(value.dtype)) if isinstance(value, Tensor) else value

    def without_counters(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_counters(one) for key, one in value.items()}
        if isinstance(value, tuple):
            return tuple(map(without_counters, value))
        return "counter" if isinstance(value, list) and [type(one) for one in value] == [int] else value

    return repr(tree_map(shown, without_counters(arguments)))
