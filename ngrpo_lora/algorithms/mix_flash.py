"""MixGRPO-Flash (arXiv 2507.21802): MixGRPO whose steps after the window are fewer, and DPM++ 2M's.

The rest of the schedule is spaced anew in `max(1, int(r * steps left))` steps; the window's last clean prediction is
the first of DPM++'s history. Departure, beside those of `_window.py`: these are steps, as in the paper, which counts 8
evaluations for Flash*; the code spaces as many points, which are one step less.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ngrpo_lora.algorithms._window import WindowAlgorithm
from ngrpo_lora.config.algorithms.mix_flash import Config
from ngrpo_lora.equations.schedule import Schedule
from ngrpo_lora.equations.solvers import VelocityFn, dpmpp_2m


class Algorithm(WindowAlgorithm[Config]):
    """See `_base.Algorithm` for the contract."""

    def rest(
        self,
        velocity_fn: VelocityFn,
        schedule: Schedule,
        window: range,
        trajectory: list[Tensor],
        velocities: list[Tensor],
        seeds: Sequence[int],
    ) -> Tensor:
        """DPM++ 2M from the window's end to sigma 0."""
        num_steps = max(1, int((self.num_steps - window.stop) * self.config.rest_ratio))
        sigma = schedule.sigmas[window.stop - 1].item()
        history = (sigma, trajectory[-2] - sigma * velocities[-1])
        return dpmpp_2m(velocity_fn, trajectory[-1], schedule.rest(window.stop, num_steps), history)[-1]
