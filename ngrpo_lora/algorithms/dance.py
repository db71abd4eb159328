"""DanceGRPO (arXiv 2505.07818): a group starts at one noise and parts by the fresh noise of its steps.

The diffusion is constant, `std = eta * sqrt(sigma - sigma_next)`; the picture is the last step's clean prediction; a
random share of the other steps is trained. Source: the paper and its code for FLUX. Departures are those of `_sde.py`.
"""

from __future__ import annotations

from torch import Tensor

from ngrpo_lora.algorithms._sde import SdeAlgorithm
from ngrpo_lora.algorithms._steps import check_steps
from ngrpo_lora.config import RolloutConfig
from ngrpo_lora.config.algorithms.dance import Config
from ngrpo_lora.equations import sde


class Algorithm(SdeAlgorithm[Config]):
    """See `_base.Algorithm` for the contract."""

    def __init__(self, config: Config, rollout: RolloutConfig, steps: range | None = None):
        super().__init__(config, rollout, steps)
        check_steps("algorithm.train_share", None, self.trainable, rollout)
        self.count = max(1, int(len(self.trainable) * config.train_share))

    def window(self, iteration: int) -> range:
        """The steps that may be trained: all but the last, which has no noise or noise that stays in the picture."""
        return self.trainable

    def steps_trained(self, window: int) -> int:
        """`int((K - 1) * train_share)`: 9 of 15 with the published settings."""
        return self.count

    def step(self, latents: Tensor, velocity: Tensor, sigmas: Tensor, index: int) -> sde.SdeStep:
        """The Gaussian of DanceGRPO's step: its standard deviation is `eta` times the root of the step in sigma."""
        return sde.dance_step(latents, velocity, sigmas[index].item(), sigmas[index + 1].item(), self.config.eta)
