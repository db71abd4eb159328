"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ngrpo_lora.config import OptimizerConfig
from ngrpo_lora.errors import UserError


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW from PyTorch, or an 8-bit optimizer from bitsandbytes.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    common = {"lr": config.learning_rate, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, eps=config.eps, **common)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise UserError(f"optimizer.name={config.name} needs bitsandbytes: pip install bitsandbytes") from error
    if config.name == "lion_8bit":
        return optim.Lion8bit(parameters, **common)
    kind = {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}[config.name]
    return kind(parameters, eps=config.eps, **common)


@torch.no_grad()
def load_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Give an optimizer the state of another of its kind; what is paged there is paged here.

    bitsandbytes loads all moments to the device, and has those of large weights in pages only where they begin.
    """
    optimizer.load_state_dict(dict(saved))
    if not getattr(optimizer, "is_paged", False):
        return
    paged: Any = optimizer
    for weight, values in optimizer.state.items():
        for name in ("state1", "state2"):
            values[name] = paged.get_state_buffer(weight, values[name].dtype).copy_(values[name])


def learning_rate_factor(config: OptimizerConfig, iteration: int, num_iterations: int) -> float:
    """Warm-up from 1 / warmup_iterations, then constant, or down to 0 at the run's end by a cosine or a line."""
    if iteration < config.warmup_iterations:
        return (iteration + 1) / config.warmup_iterations
    if config.schedule == "constant":
        return 1.0
    done = (iteration - config.warmup_iterations) / max(1, num_iterations - config.warmup_iterations)
    return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
