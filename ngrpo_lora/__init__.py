"""Neighbor GRPO for flow-matching image models: the mathematics, usable without the trainer."""

from ngrpo_lora.advantages import group_advantages
from ngrpo_lora.noise import derive_seed, gaussian_noise, neighbor_noise
from ngrpo_lora.solvers import dpmpp_2m, dpmpp_2m_step, euler, flow_sigmas
from ngrpo_lora.surrogate import auto_temperature, clipped_objective, leaping_log_ratio, leaping_logits

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
