"""A family whose pipeline may have two transformers, each for its own noise levels (Wan 2.2 A14B).

`transformer` draws timesteps from `boundary_ratio` of 1000 on (high noise), `transformer_2` those below it (low noise),
each with a guidance scale of its own. The adapter is for one of them (`model.expert`); the other one stays frozen and
draws its steps of every rollout. What is trained are the steps of the first alone: the other's have no gradient.

Source: diffusers' `WanPipeline`. As there, `guidance_scale` says whether there is guidance by two passes at all.
"""

from __future__ import annotations

from copy import copy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ngrpo_lora.config import Expert, ModelConfig, RolloutConfig
from ngrpo_lora.equations.solvers import flow_sigmas
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.models._base import BaseFamily, Parts
from ngrpo_lora.models._index import model_index, model_json
from ngrpo_lora.types import TextEmbeds

DEFAULT: Expert = "high_noise"
OTHER: dict[Expert, Expert] = {"high_noise": "low_noise", "low_noise": "high_noise"}
TIMESTEPS = 1000


class ExpertsFamily(BaseFamily):
    """A family with one transformer or two; a subclass says what two of them recommend."""

    default_guidances: ClassVar[tuple[float, float]]
    """Guidance scales of a pair, at high and at low noise, where the configuration gives none."""

    is_counterpart = False
    """Whether this view of a pair draws with the transformer that is not the adapter's."""

    @property
    def expert(self) -> Expert | None:
        """Which of a pair computes here: the adapter's transformer, in a `counterpart` the other one."""
        if self.pipeline.transformer_2 is None:
            return None
        chosen = self.config.expert or DEFAULT
        return OTHER[chosen] if self.is_counterpart else chosen

    @property
    def transformers(self) -> list[Any]:
        """The transformer that the adapter is for, and the other one of a pair."""
        if self.expert is None:
            return super().transformers
        high, low = self.pipeline.transformer, self.pipeline.transformer_2
        return [high, low] if self.expert == "high_noise" else [low, high]

    def left_out(self, parts: Parts) -> tuple[str, ...]:
        """Names of the pipeline components that are not loaded for `parts`."""
        return super().left_out(parts) + (("transformer_2",) if parts == "text" else ())

    def configure(self, config: ModelConfig) -> None:
        """Apply the settings of `config`, with both guidance scales of a pair."""
        super().configure(config)
        if self.expert is None:
            return
        high, low = config.guidance_scale, config.guidance_scale_2
        recommended = self.default_guidances if high is None else (high, high)
        self.settings |= {
            "expert": self.expert,
            "guidance_scale": recommended[0],
            "guidance_scale_2": recommended[1] if low is None else low,
        }

    @classmethod
    def foreseen_steps(cls, model: ModelConfig, rollout: RolloutConfig) -> range:
        """What `trained_steps` will be, by the model's small JSON files."""
        index = model_index(model.path, model.revision)
        if not has_two(index):
            return super().foreseen_steps(model, rollout)
        scheduler = model_json(model.path, "scheduler/scheduler_config.json", model.revision)
        sigmas = flow_sigmas(rollout.num_steps, rollout.shift or scheduler.get("flow_shift") or 1.0)
        return steps_of(model.expert or DEFAULT, sigmas, index["boundary_ratio"])

    def trained_steps(self, sigmas: Tensor) -> range:
        """The steps of (K + 1,) noise levels that the adapter's transformer draws.

        Raises:
            ConfigError: there are none.
        """
        if self.expert is None:
            return super().trained_steps(sigmas)
        return steps_of(self.expert, sigmas, self.pipeline.config.boundary_ratio)

    @property
    def probe_sigma(self) -> float:
        """A noise level that the adapter's transformer draws."""
        if self.expert is None:
            return super().probe_sigma
        return 1.0 if self.expert == "high_noise" else self.pipeline.config.boundary_ratio / 2

    def velocity(self, latents: Tensor, sigma: Tensor | float, text: TextEmbeds) -> Tensor:
        """Velocities as of any family, each by the transformer that draws its noise level."""
        if self.expert is None:
            return super().velocity(latents, sigma, text)
        levels = torch.as_tensor(sigma, dtype=torch.float32).cpu().expand(len(latents))
        own = (is_high(levels, self.pipeline.config.boundary_ratio) == (self.expert == "high_noise")).tolist()
        if all(own):
            return super().velocity(latents, sigma, text)
        if not any(own):
            return BaseFamily.velocity(self.counterpart(), latents, sigma, text)
        rows = [[row for row, mine in enumerate(own) if mine == wanted] for wanted in (True, False)]
        parts = [self.velocity(latents[some], levels[some], text[some]) for some in rows]
        return torch.cat(parts)[torch.tensor(rows[0] + rows[1], device=self.device).argsort()]

    def counterpart(self) -> Self:
        """A view of this model that draws with the other transformer of the pair."""
        other = copy(self)
        other.is_counterpart, other.transformer = True, self.transformers[1]
        return other

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Guidance by two passes, at the scale of the transformer that has computed them."""
        scale = self.settings["guidance_scale_2" if self.expert == "low_noise" else "guidance_scale"]
        return unconditional + scale * (conditional - unconditional)

    def load_lora(self, source: Any, name: str, expert: Expert | None = None) -> None:
        """Put a LoRA on the transformer that it is for, else on the adapter's."""
        second = (expert or self.expert) == "low_noise"
        options = {"load_into_transformer_2": True} if second else {}
        self.pipeline.load_lora_weights(source, adapter_name=name, **options)


def has_two(index: dict[str, Any]) -> bool:
    """Whether a model has two transformers, by its `model_index.json`."""
    return index.get("transformer_2", [None])[0] is not None


def is_high(sigmas: Tensor, boundary: float) -> Tensor:
    """Which noise levels (N,) float32 are the high_noise transformer's, as timesteps are compared in diffusers."""
    return sigmas * TIMESTEPS >= boundary * TIMESTEPS


def steps_of(expert: Expert, sigmas: Tensor, boundary: float) -> range:
    """The steps of (K + 1,) decreasing noise levels that one transformer of a pair draws.

    Raises:
        ConfigError: there are none.
    """
    count, high = len(sigmas) - 1, int(is_high(sigmas[:-1], boundary).sum())
    steps = range(high) if expert == "high_noise" else range(high, count)
    if not steps:
        raise ConfigError(
            f"model.expert={expert} must draw at least one of the steps, but the other transformer draws all {count}: "
            f"the one for low noise draws below {boundary:g}, and the lowest step starts at {sigmas[-2]:.3g}; choose "
            "the other one, or lower rollout.shift or raise rollout.num_steps"
        )
    return steps
