"""One step of the adapter: scaled gradients, summed over processes, clipped, skipped where not finite, averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ngrpo_lora.config import OptimizerConfig
from ngrpo_lora.errors import SharedError, UserError
from ngrpo_lora.training.optimizers import learning_rate_factor, load_state, make_optimizer
from ngrpo_lora.training.processes import Processes

MAX_SKIPPED_IN_A_ROW = 10


def advice(rate: float) -> str:
    """What to do about updates that are too large, which a resumed run accepts."""
    return f"lower optimizer.learning_rate ({rate:g}) and go on with resume=latest, the last checkpoint that is well"


class LoraStep:
    """The adapter's live and averaged weights and what moves them; all processes hold the same.

    parameters: the live weights by name, float32.
    averaged: their moving average, which is evaluated and exported; without `optimizer.ema_decay` the live ones.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Mapping[str, nn.Parameter],
        processes: Processes,
        base_dtype: torch.dtype,
        device: torch.device,
    ):
        self.config, self.parameters, self.processes = config, dict(parameters), processes
        averaging = config.ema_decay > 0
        self.averaged = {n: p.detach().clone() if averaging else p.detach() for n, p in parameters.items()}
        self.optimizer = make_optimizer(config, parameters.values())
        # float16 ends at 6e-8, where the gradients of a large picture begin: they are scaled up on their way.
        self.scaler = torch.amp.GradScaler(device.type, enabled=base_dtype == torch.float16)
        self.taken = self.skipped_in_a_row = 0

    def set_rate(self, iteration: int, num_iterations: int) -> float:
        """Set the learning rate of an iteration, counted from 0, and return it."""
        rate = self.config.learning_rate * learning_rate_factor(self.config, iteration, num_iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss to those that wait for `take`."""
        self.scaler.scale(loss).backward()

    def forget(self) -> None:
        """Drop the gradients that wait for `take`."""
        for parameter in self.parameters.values():  # as `zero_grad` does, which takes longer to describe itself
            parameter.grad = None

    def take(self, finite: bool, empty: bool) -> float:
        """Move the adapter by the gradients that wait, and forget them.

        Args:
            finite: whether every loss of this step was finite, on all processes.
            empty: whether no process had a loss; nothing moves then but the average.
        Returns:
            The gradient's norm before it was clipped; NaN where the step was skipped, as it was not finite.
        """
        parameters = self.parameters.values()
        if self.processes.count > 1 and not empty:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.processes.sum_([p.grad for p in parameters if p.grad is not None])
        if not empty:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm).item()
        if finite and math.isfinite(norm):
            if not empty:
                self.scaler.step(self.optimizer)
            self.taken, self.skipped_in_a_row = self.taken + 1, 0
            self._average()
        else:
            norm, self.skipped_in_a_row = math.nan, self.skipped_in_a_row + 1
        if not empty:
            self.scaler.update()
        self.forget()
        return norm

    def check_progress(self) -> None:
        """End a run that has moved out of the numbers, or has not moved for long.

        Raises:
            SharedError: the adapter's weights are not finite any more, or too many steps in a row were skipped.
        """
        largest = torch.stack([*torch._foreach_norm([p.detach() for p in self.parameters.values()], math.inf)])
        if not bool(largest.isfinite().all()):
            raise SharedError(f"the adapter's weights are no longer finite; {advice(self.config.learning_rate)}")
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise SharedError(
                f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite; "
                f"{advice(self.config.learning_rate)}"
            )

    @torch.no_grad()
    def _average(self) -> None:
        """Every `ema_every` steps, keep `ema_decay` of the average and take the rest from the live weights."""
        if self.config.ema_decay > 0 and self.taken % self.config.ema_every == 0:
            update = get_ema_multi_avg_fn(self.config.ema_decay)
            update([*self.averaged.values()], [*self.parameters.values()], self.taken)

    def state(self) -> dict[str, Any]:
        """What `restore` needs; tensors and plain values only."""
        return {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "taken": self.taken,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of the same adapter.

        Raises:
            UserError: it is of an adapter with other layers or another rank.
        """
        shapes = {name: p.shape for name, p in self.parameters.items()}
        if {name: p.shape for name, p in state["parameters"].items()} != shapes:
            raise UserError(
                "the checkpoint's adapter has other layers or another rank; resume with its own config.yaml"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
            self.averaged[name].copy_(state["averaged"][name])
        load_state(self.optimizer, state["optimizer"])
        if state.get("scaler"):  # of float16
            self.scaler.load_state_dict(state["scaler"])
        self.taken = state.get("taken", 0)  # checkpoints of 0.1.0 have none, and averaged every step
