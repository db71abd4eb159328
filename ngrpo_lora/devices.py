"""Where a network runs, and in which number type."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ngrpo_lora.errors import UserError

__all__ = [
    "free_memory",
    "is_out_of_memory",
    "lent",
    "release_memory",
    "resolve_device",
    "resolve_dtype",
    "use_device",
    "without_cudnn_attention",
]


def resolve_device(device: str) -> str:
    """Resolve `auto` to a GPU (CUDA, else MPS) where there is one, otherwise to the CPU.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device} needs a GPU that PyTorch can use, and there is none; use cpu or auto")
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """Resolve `auto` to bfloat16 where the device has instructions for it, otherwise to float32.

    On a CPU these are AVX512-BF16 and AMX, with which the embedded model runs twice as fast; without them bfloat16
    is slower than float32.
    """
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.6 has none
        native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    else:
        native = False
    return "bfloat16" if native else "float32"


def free_memory() -> int:
    """Bytes that are free on that GPU of this machine which has the fewest.

    Several GPUs are asked in a process that ends: one that asks keeps a CUDA context, some hundred MiB, on each.

    Raises:
        subprocess.CalledProcessError: one of several GPUs cannot be used.
    """
    if torch.cuda.device_count() == 1:  # on which this process computes
        return torch.cuda.mem_get_info(0)[0]
    ask = "import torch; print(min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))"
    return int(subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, check=True).stdout)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU or of the system is used up."""
    from accelerate.utils.memory import should_reduce_batch_size  # slow to import

    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, Exception) and should_reduce_batch_size(error))


def release_memory() -> None:
    """Give back to the device what no tensor uses any more, also what only cycles of objects hold."""
    from accelerate.utils.memory import clear_device_cache  # slow to import

    clear_device_cache(garbage_collection=True)


def use_device(device: str) -> None:
    """Make a GPU the default device of this process; there is nothing to do for other devices."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)


@contextmanager
def lent(network: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Compute with copies of a frozen network's weights on a device while the context lasts.

    The weights themselves wait in system memory, and take their places again at the end: nothing is copied back.
    """
    modules = [*network.modules()]
    held: list[dict[str, Any]] = [*(one._parameters for one in modules), *(one._buffers for one in modules)]
    before = [{**owner} for owner in held]
    weights = {weight for owner in before for weight in owner.values() if weight is not None}
    copies = {weight: weight.to(device) for weight in weights}
    try:
        for owner in held:
            owner.update({name: copies.get(weight) for name, weight in owner.items()})
        yield
    finally:
        for owner, own in zip(held, before, strict=True):
            owner.update(own)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep PyTorch from cuDNN's kernel of attention while the context lasts; it chooses among its others.

    On an H100 it prefers cuDNN's, whose backward pass in FLUX.1 at 720 px ended with an illegal memory access (PyTorch
    2.11, cuDNN 9.19), and with a mask has given NaN (https://github.com/pytorch/pytorch/issues/196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
