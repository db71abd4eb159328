"""Flow-GRPO's stochastic steps in a window that moves along the schedule, for MixGRPO and MixGRPO-Flash.

A group starts at one noise; exactly the window's steps are trained. Departures, beside those of `_sde.py`: the window
never holds the last step, which leads to sigma 0; of the published ways to shrink the time between moves there is the
exponential one.
"""

from __future__ import annotations

import itertools
import math
from typing import TypeVar

from torch import Tensor

from ngrpo_lora.algorithms._sde import SdeAlgorithm
from ngrpo_lora.algorithms._steps import check_steps
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.config.algorithms._window import WindowConfig
from ngrpo_lora.equations import sde
from ngrpo_lora.seeds import derive_seed

Settings = TypeVar("Settings", bound=WindowConfig)


class WindowAlgorithm(SdeAlgorithm[Settings]):
    """See `_base.Algorithm` for the contract; a method may fill in `rest`."""

    def __init__(self, config: Settings, rollout: RolloutConfig, steps: range | None = None):
        super().__init__(config, rollout, steps)
        check_steps("algorithm.window_size", config.window_size, self.trainable, rollout)

    def window(self, iteration: int) -> range:
        """The window of an iteration, of `window_size` steps."""
        config = self.config
        positions = len(self.trainable) - config.window_size + 1
        match config.window:
            case "frozen":
                start = 0
            case "progressive":
                start = iteration // config.window_every % positions
            case "random":
                start = derive_seed("window", iteration) % positions
            case "decayed":
                start = self.decayed_start(iteration, positions)
        return self.trainable[start : start + config.window_size]

    def decayed_start(self, iteration: int, positions: int) -> int:
        """The window's first step where it stays `tau * exp(-k * max(l - lambda, 0))` iterations at step l."""
        config = self.config
        past = [max(step - config.window_decay_from, 0) for step in range(positions)]
        stays = [max(1, int(config.window_every * math.exp(-config.window_decay * steps))) for steps in past]
        ends = list(itertools.accumulate(stays))
        return next(step for step, end in enumerate(ends) if iteration % ends[-1] < end)

    def step(self, latents: Tensor, velocity: Tensor, sigmas: Tensor, index: int) -> sde.SdeStep:
        """The Gaussian step of Flow-GRPO, which MixGRPO takes inside its window."""
        sigma, sigma_next = sigmas[index].item(), sigmas[index + 1].item()
        return sde.flow_sde_step(latents, velocity, sigma, sigma_next, self.config.eta, sigmas[1].item())
