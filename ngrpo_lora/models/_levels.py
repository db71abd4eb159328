"""The noise levels of a model: how its schedule is spaced, and at which of its steps the adapter is trained."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ngrpo_lora.config import Expert, ModelConfig, RolloutConfig
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import flow_sigmas
from ngrpo_lora.errors import ConfigError


class NoiseLevels:
    """The part of every family that knows of noise levels; `_base.BaseFamily` adds the rest."""

    config: ModelConfig
    pipeline: Any
    latent_shape: tuple[int, ...]

    @property
    def expert(self) -> Expert | None:
        """Which part of the noise levels the adapter's transformer draws; None: all of them."""
        return None

    @property
    def probe_sigma(self) -> float:
        """A noise level that the adapter's transformer draws."""
        return 0.5

    @classmethod
    def foreseen_steps(cls, model: ModelConfig, rollout: RolloutConfig) -> range:
        """What `trained_steps` will be, before anything large is loaded.

        Raises:
            ConfigError: `model.expert` does not fit the model, or no step would be trained.
        """
        refuse_experts(model)
        return range(rollout.num_steps)

    def trained_steps(self, sigmas: Tensor) -> range:
        """The steps of (K + 1,) noise levels at which the adapter's transformer computes the velocity: all, of one."""
        refuse_experts(self.config)
        return range(len(sigmas) - 1)

    def shift(self, num_steps: int) -> float:
        """The timestep shift of the model's own scheduler at this size: `exp(mu)`, or a constant."""
        scheduler = self.pipeline.scheduler.config
        if scheduler.get("use_dynamic_shifting", False):
            return math.exp(self.mu(num_steps))
        return scheduler.get("shift") or scheduler.get("flow_shift") or 1.0

    def mu(self, num_steps: int) -> float:
        """Log of the dynamic shift, linear in image tokens between the scheduler's two points (FLUX.1, Qwen-Image)."""
        scheduler = self.pipeline.scheduler.config
        slope = (scheduler.max_shift - scheduler.base_shift) / (
            scheduler.max_image_seq_len - scheduler.base_image_seq_len
        )
        return scheduler.base_shift + slope * (self.image_tokens - scheduler.base_image_seq_len)

    @property
    def image_tokens(self) -> int:
        """Tokens of one sample: patches of 2 x 2 latents, unless a family says otherwise."""
        return math.prod(self.latent_shape[1:]) // 4

    def sigmas(self, num_steps: int, shift: float | None = None) -> Tensor:
        """(K + 1,) noise levels, spaced by `shift`, or by the model's own shift where it is None."""
        return flow_sigmas(num_steps, shift or self.shift(num_steps))

    def schedule(self, num_steps: int, shift: float | None = None) -> Schedule:
        """The noise levels of `sigmas` with the shift that spaced them."""
        return Schedule(self.sigmas(num_steps, shift), shift or self.shift(num_steps))


def refuse_experts(config: ModelConfig) -> None:
    """Raise ConfigError where settings of a model with two transformers are given to one that has a single one."""
    for key in ("expert", "guidance_scale_2"):
        if (value := getattr(config, key)) is not None:
            raise ConfigError(
                f"model.{key} must be null for {config.path!r}, which has one transformer for all noise levels, got "
                f"{value}"
            )
