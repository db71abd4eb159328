"""Where a reward's network runs, in which number type, and where it waits between uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ngrpo_lora.config import ModelRewardConfig
from ngrpo_lora.devices import lent, resolve_device

__all__ = ["in_use", "placement"]


def placement(config: ModelRewardConfig, device: str, half: str = "float16") -> tuple[str, torch.dtype]:
    """Resolve the device and the number type of a reward's network.

    Args:
        device: where it runs when the reward's own setting is `auto`.
        half: the number type on a GPU when the reward's own setting is `auto`; on a CPU that is float32.
    """
    device = resolve_device(device if config.device == "auto" else config.device)
    dtype = ("float32" if device == "cpu" else half) if config.dtype == "auto" else config.dtype
    return device, getattr(torch, dtype)


@contextmanager
def in_use(network: Any, device: str, offload: bool) -> Iterator[Any]:
    """Have the network on its device while the context lasts; with `offload` it is there as a copy, which then goes."""
    with lent(network, device) if offload else nullcontext(network.to(device)):
        yield network
