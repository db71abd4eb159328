"""Chooses how a transformer computes attention (`model.attention`)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from ngrpo_lora.errors import UserError


def use_attention(transformer: Any, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Compute attention with one of diffusers' backends, such as `flash`.

    Raises:
        UserError: there is none of that name, or it cannot run here, or has no backward pass.
    """
    try:
        transformer.set_attention_backend(backend)
        probe = torch.randn(1, 64, 2, 64, device=device, dtype=dtype, requires_grad=True)
        # Some kernels are for inference only: gradients would leave out all that passes through attention.
        dispatch_attention_fn(probe, probe, probe).sum().backward()
    except Exception as error:  # packages of others raise what they like
        raise UserError(f"model.attention={backend} cannot be used for training here: {error}") from error
