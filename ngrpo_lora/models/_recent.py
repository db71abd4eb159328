"""Conditionings of prompts that were encoded before: kept in system memory for a while, as captions repeat."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.types import TextEmbeds

__all__ = ["PromptCache", "RecentPrompts"]

MAX_BYTES = 2**29
"""More than a hundred prompts of FLUX.1 in bfloat16, and every caption of the embedded model."""


class PromptCache(Protocol):
    """Conditionings of prompts that were encoded before; `_embeddings.EmbeddingCache` keeps them on disk."""

    def encode(self, prompts: Sequence[str | Prompt], device: torch.device) -> TextEmbeds:
        """The conditioning of prompts on `device`, the same as `BaseFamily.encode` gives."""
        ...


class RecentPrompts:
    """The tensors of single prompts by prompt; those that were asked for longest ago make room."""

    def __init__(self, max_bytes: int = MAX_BYTES):
        self.max_bytes, self.size = max_bytes, 0
        self.kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def of(self, prompts: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Those of the prompts that are kept, in system memory."""
        found = {prompt: self.kept[prompt] for prompt in prompts if prompt in self.kept}
        for prompt in found:
            self.kept.move_to_end(prompt)
        return found

    def keep(self, prompt: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep a prompt's tensors as far as there is room; returns them in system memory."""
        self.kept[prompt] = there = {name: tensor.cpu() for name, tensor in tensors.items()}
        self.size += size_of(there)
        while self.size > self.max_bytes:
            self.size -= size_of(self.kept.popitem(last=False)[1])
        return there


def size_of(tensors: dict[str, Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())
