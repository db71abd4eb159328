"""Neighbor GRPO for flow-matching image models: the mathematics, usable without the trainer.

The names load when they are first used, so that the command and a configuration do without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ngrpo_lora.equations.advantages import group_advantages
    from ngrpo_lora.equations.noise import gaussian_noise, neighbor_noise
    from ngrpo_lora.equations.solvers import dpmpp_2m, dpmpp_2m_step, euler, flow_sigmas
    from ngrpo_lora.equations.surrogate import auto_temperature, clipped_objective, leaping_log_ratio, leaping_logits
    from ngrpo_lora.seeds import derive_seed

__all__ = [
    "auto_temperature",
    "clipped_objective",
    "derive_seed",
    "dpmpp_2m",
    "dpmpp_2m_step",
    "euler",
    "flow_sigmas",
    "gaussian_noise",
    "group_advantages",
    "leaping_log_ratio",
    "leaping_logits",
    "neighbor_noise",
]

HOMES = {
    "equations.advantages": ("group_advantages",),
    "equations.noise": ("gaussian_noise", "neighbor_noise"),
    "equations.solvers": ("dpmpp_2m", "dpmpp_2m_step", "euler", "flow_sigmas"),
    "equations.surrogate": ("auto_temperature", "clipped_objective", "leaping_log_ratio", "leaping_logits"),
    "seeds": ("derive_seed",),
}


def __getattr__(name: str) -> Any:
    for module, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"ngrpo_lora.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
