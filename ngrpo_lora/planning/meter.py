"""Peak memory and floating-point operations of PyTorch code, counted and not guessed.

`Meter` follows every tensor from its birth to its death. It does so on the CPU with real numbers, and on the meta
device, where tensors have shapes and no contents: there a model of any size runs forward and backward within seconds
and without weights. A deep model is measured on a few of its blocks, `thin`, for blocks that are alike cost alike.

What is counted is what operators return. What kernels use inside themselves (workspaces of convolutions and of fused
attention) and what an allocator loses between tensors is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = ["FullMasks", "Meter", "attention_on_meta", "thin"]

aten = torch.ops.aten


@dataclass
class Call:
    """One call of a block that stands for `count` equal blocks; sizes in bytes.

    start: alive before the call. forward, backward: most alive in it and until the next call, in either pass.
    returned: alive when the backward pass comes to it.
    """

    count: int
    start: int
    forward: int = 0
    backward: int = 0
    returned: int | None = None
    flops: int = 0


@dataclass
class Part:
    """What a part of a forward pass has cost: bytes beyond those alive before it, at most and after it, and FLOPs."""

    peak: int = 0
    left: int = 0
    flops: int = 0


class Meter(TorchDispatchMode):
    """Live bytes of the tensors made while it is entered, their peak, and FLOPs (two a multiply-add).

    Args:
        counts: blocks of a thinned model, and for how many blocks each of them stands.
    """

    def __init__(self, counts: dict[nn.Module, int] | None = None):
        super().__init__()
        self.live, self.call, self.in_backward = 0, 0, False
        self.calls = [Call(1, 0)]  # what precedes the first call of a block, and every call
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.counts, self.hooks = counts or {}, []

    def __enter__(self) -> Meter:
        for block, count in self.counts.items():
            self.hooks.append(block.register_forward_pre_hook(self._before(count)))
            self.hooks.append(block.register_forward_hook(self._after))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    @property
    def peak(self) -> int:
        """Most bytes alive at once, in the model with all its blocks.

        While a block computes, blocks before it hold what they keep for the backward pass; in that pass, blocks after
        it have left something behind: where the model is called twice, gradients that wait for those of the first
        call. A block of the thinned model stands for others that do so as much as itself.
        """
        starts = [*(call.start for call in self.calls), self.live]
        keep = [
            (call.count - 1) * (after - before)
            for call, (before, after) in zip(self.calls, pairwise(starts), strict=True)
        ]
        leave = [0] * len(keep)
        for index, (earlier, call) in enumerate(pairwise(self.calls), 1):
            if call.returned is not None and earlier.returned is not None:
                leave[index] = (call.count - 1) * (earlier.returned - call.returned) + keep[index]
        most, before, after = 0, 0, sum(leave)
        for call, kept, left in zip(self.calls, keep, leave, strict=True):
            after -= left
            most = max(most, call.forward + before + kept, call.backward + before + max(kept, left) + after)
            before += kept
        return most

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products, convolutions and attention, in the model with all blocks."""
        return sum(call.count * call.flops for call in self.calls)

    @contextmanager
    def part(self) -> Iterator[Part]:
        """Measure what the block costs, within one call and without gradient; it counts here as well."""
        part, call, start = Part(), self.calls[self.call], self.live
        before, flops, call.forward = call.forward, call.flops, start
        try:
            yield part
        finally:
            part.peak, part.left, part.flops = call.forward - start, self.live - start, call.flops - flops
            call.forward = max(before, call.forward)

    def add(self, part: Part) -> None:
        """Count a part that is not walked again; what it leaves is not counted, and is made by the caller."""
        call = self.calls[self.call]
        call.forward, call.flops = max(call.forward, self.live + part.peak), call.flops + part.flops

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := FLOPS.get(func.overloadpacket):
            self.calls[self.call].flops += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage(), func)
        return result

    def _follow(self, storage: torch.UntypedStorage, func: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages or any(returned.alias_info for returned in func._schema.returns):
            return  # a view, or written in place

        def forget(_: object) -> None:
            del self.storages[key]
            self.live -= size

        self.storages[key] = weakref.ref(storage, forget)
        self.live += size
        self._observe()

    def _observe(self) -> None:
        call = self.calls[self.call]
        if self.in_backward:
            call.backward = max(call.backward, self.live)
        else:
            call.forward = max(call.forward, self.live)

    def _before(self, count: int) -> Callable[[nn.Module, Any], None]:
        def start(block: nn.Module, args: Any) -> None:
            if not self.in_backward:  # where gradient checkpointing calls blocks again
                self.call = len(self.calls)
                self.calls.append(Call(count, self.live, forward=self.live))

        return start

    def _after(self, block: nn.Module, args: Any, output: Any) -> None:
        index = self.call

        def come_back(gradient: Tensor) -> None:
            self.call, self.in_backward = index, True
            if self.calls[index].returned is None:
                self.calls[index].returned = self.live
            self._observe()

        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad and not self.in_backward:
                tensor.register_hook(come_back)


def thin(model: nn.Module) -> dict[nn.Module, int]:
    """Keep three of every row of equal blocks in `model`, and return for how many blocks each one stands.

    The first is unlike the others for what it is given, the last for what follows; the middle one stands for all else.
    """
    counts: dict[nn.Module, int] = {}
    for name, blocks in [*model.named_children()]:
        if isinstance(blocks, nn.ModuleList):
            rows = [[*row] for _, row in groupby(blocks, lambda b: [(n, p.shape) for n, p in b.named_parameters()])]
            kept = [(row, min(len(row), 3)) for row in rows]
            counts |= {row[i]: len(row) - 2 if (i, left) == (1, 3) else 1 for row, left in kept for i in range(left)}
            setattr(model, name, nn.ModuleList(row[i] for row, left in kept for i in range(left)))
    return counts


class FullMasks(TorchFunctionMode):
    """Takes masks on the meta device, where they have no contents, for true everywhere, and their opposites for empty.

    HunyuanVideo 1.5's transformer sorts tokens by masks, and asks whether there is a picture. Numbers are not written
    into tensors there: its VAE does so for every row of its masks, which takes minutes for a long video.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and is_mask(args[0]):
            if func is torch.all:
                return torch.tensor(True)
            if func is Tensor.__invert__:
                return args[0][:0]
        if func is Tensor.__setitem__ and args[0].is_meta and not isinstance(args[2], Tensor):
            return None  # there is nothing to write to, but some of diffusers' masks are written row by row
        if func is Tensor.__getitem__ and is_mask(args[1]) and args[0].is_meta:
            return args[0][: len(args[1])].clone()
        return func(*args, **(kwargs or {}))


def is_mask(value: Any) -> bool:
    """Whether something is a tensor of truth values on the meta device."""
    return isinstance(value, Tensor) and value.is_meta and value.dtype == torch.bool


@contextmanager
def attention_on_meta() -> Iterator[None]:
    """Attend by a fused kernel, which holds no matrix of all pairs of tokens, in place of the meta device's own.

    Masks count as `FullMasks` says.
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused_attention
    try:
        with FullMasks():
            yield
    finally:
        F.scaled_dot_product_attention = original


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention, (B, heads, tokens, D) each -> (B, heads, tokens, D).

    For the backward pass it keeps what FlashAttention keeps.
    """
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    # Five products of the size of the forward pass's two: the scores once more, and four gradients.
    return sdpa_flop_count(query.shape, key.shape, value.shape) * 5 // 2


FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
