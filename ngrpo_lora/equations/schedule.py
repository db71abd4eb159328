"""The noise levels of a rollout, and those of a rest that is solved in fewer steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ngrpo_lora.equations.solvers import shifted


@dataclass(frozen=True)
class Schedule:
    """Noise levels and the timestep shift that spaced them.

    sigmas: (K + 1,) float32, decreasing, the last one 0.
    shift: s of `s * t / (1 + (s - 1) * t)`, resolved: the model's own where the configuration gives none.
    """

    sigmas: Tensor
    shift: float

    @property
    def num_steps(self) -> int:
        """The number K of solver steps, one less than there are sigmas."""
        return len(self.sigmas) - 1

    def rest(self, step: int, num_steps: int) -> Tensor:
        """Noise levels from `sigmas[step]` to 0 in `num_steps` steps, evenly spaced before the same shift.

        Source: MixGRPO-Flash (arXiv 2507.21802), which solves what follows its window of stochastic steps so.

        Returns:
            (num_steps + 1,) float32; the first is `sigmas[step]` to the bit.
        Raises:
            ValueError: there is no such step, or fewer than one step is asked for.
        """
        if not 0 <= step < self.num_steps or num_steps < 1:
            raise ValueError(
                f"step must be from 0 to {self.num_steps - 1} and num_steps at least 1, got {step} and {num_steps}"
            )
        start = self.sigmas[step].double()
        time = start / (self.shift - (self.shift - 1) * start)  # the inverse of the shift
        sigmas = shifted(time * torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), self.shift).float()
        sigmas[0] = self.sigmas[step]
        return sigmas
