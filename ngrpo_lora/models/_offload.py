"""Transformer blocks whose weights stay in system memory and are loaded to the device in turn (`model.swap_blocks`).

The frozen weights of an offloaded block lie in system memory, pinned for a GPU, as one run of bytes. The device has
buffers for two such blocks: while one computes, the next is copied on a stream of its own, first to last in a forward
pass and last to first where gradient checkpointing recomputes them in a backward pass. LoRA weights stay on the device.

A block stays resident until another one needs its buffer, not only for its forward pass: a recomputed block is read
until its gradients are there, and checkpointing leaves it by an exception as soon as it has what it needs.

diffusers' group offloading is not for training: it moves the LoRA weights too, from under the optimizer, and with a
stream it puts back the copies that it took before the first update.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ngrpo_lora.errors import UserError

__all__ = ["blocks_of", "swap_blocks"]

ALIGNMENT = 512  # bytes, as CUDA's allocator: kernels are chosen by it
PIECE = 1 << 24  # bytes; PyTorch rounds pinned memory up to a power of two


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """A transformer's repeated blocks, in the order in which they run: the entries of its lists of modules."""
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def swap_blocks(blocks: Sequence[nn.Module], count: int, device: torch.device) -> None:
    """Offload the last `count` of `blocks`, given in the order in which they run, to system memory from now on.

    Their weights then seem to be on `device`, with their shapes. In a backward pass blocks must be recomputed from
    their inputs (gradient checkpointing); a gradient through a block that was not is an error of autograd.

    Raises:
        UserError: there are fewer blocks, or their weights are quantised.
    """
    if count > len(blocks):
        raise UserError(f"model.swap_blocks must be at most {len(blocks)}, the blocks of this model, got {count}")
    if not all(weight.is_floating_point() for block in blocks for weight in block.parameters()):
        raise UserError(f"model.swap_blocks must be 0 for a model whose weights are quantised, got {count}")
    swap = BlockSwap([OffloadedBlock(block, device) for block in blocks[-count:]], device)
    for index, block in enumerate(blocks[-count:]):
        block.register_forward_pre_hook(lambda *_, index=index: swap.load(index))


class Span(NamedTuple):
    """A weight and its range of bytes, start to stop, among those of its block."""

    weight: nn.Parameter
    start: int
    stop: int


class OffloadedBlock:
    """The weights of one block: in system memory, and in a buffer of the device while the block is resident."""

    def __init__(self, block: nn.Module, device: torch.device):
        self.spans: list[Span] = []
        self.size = 0
        for weight in block.parameters():
            start = -(-self.size // ALIGNMENT) * ALIGNMENT
            self.size = start + weight.nbytes
            self.spans.append(Span(weight, start, self.size))
        host = torch.empty(self.size, dtype=torch.uint8)
        self.away = [torch.full((), torch.nan, dtype=w.dtype, device=device).expand(w.shape) for w, *_ in self.spans]
        for view, (weight, *_) in zip(self.views(host), self.spans, strict=True):
            view.copy_(weight.data)
        pieces = host.split(PIECE)
        self.pieces = [piece.pin_memory() for piece in pieces] if device.type == "cuda" else pieces
        self.unload()

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The block's weights as views of `buffer`, (size,) uint8 or longer."""
        return [buffer[start:stop].view(w.dtype).view(w.shape) for w, start, stop in self.spans]

    def load(self, buffer: Tensor) -> None:
        """Copy the weights into a buffer on the device and use them there."""
        for piece, place in zip(self.pieces, buffer[: self.size].split(PIECE), strict=True):
            place.copy_(piece, non_blocking=True)
        for (weight, *_), view in zip(self.spans, self.views(buffer), strict=True):
            weight.data = view

    def unload(self) -> None:
        """Release the buffer; the placeholders in place of the weights take no memory and make any result NaN."""
        for (weight, *_), placeholder in zip(self.spans, self.away, strict=True):
            weight.data = placeholder
            increment_version(weight)  # autograd must not read the buffer as this weight any more


class BlockSwap:
    """Two buffers on the device, each the size of a block, and which block is resident in each."""

    def __init__(self, blocks: list[OffloadedBlock], device: torch.device):
        self.blocks, self.device = blocks, device
        size = max(block.size for block in blocks)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in blocks[:2]]
        self.resident: list[int | None] = [None for _ in self.buffers]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last = -1

    def load(self, index: int) -> None:
        """Make a block resident before it computes, and start to load the next one."""
        count, forwards = len(self.blocks), index == (self.last + 1) % len(self.blocks)
        self.last = index
        if index not in self.resident:
            self.fetch(index, 0)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        following = index + 1 if forwards else index - 1
        if not torch.is_grad_enabled():
            following %= count  # another forward pass; with gradients the last block is the first to be recomputed
        if following in range(count) and following not in self.resident:
            self.fetch(following, 1 - self.resident.index(index))

    def fetch(self, index: int, slot: int) -> None:
        """Copy a block into the buffer `slot`, after all work that the device was given so far."""
        if (previous := self.resident[slot]) is not None:
            self.blocks[previous].unload()
        self.resident[slot] = index
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            self.blocks[index].load(self.buffers[slot])
