"""Where a network runs, and in which number type."""

from __future__ import annotations

import torch

from ngrpo_lora.errors import UserError

__all__ = ["resolve_device", "resolve_dtype"]


def resolve_device(device: str) -> str:
    """`auto` is a GPU where there is one.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device} needs a GPU that PyTorch can use, and there is none; use cpu or auto")
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` is bfloat16 where the device has instructions for it, otherwise float32.

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
