"""Exact DPM-Solver++ 2M for the flow-matching pipelines of diffusers: sigma and timestep are one number.

    pipe.scheduler = FlowDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

Latents are `(1 - sigma) * clean + sigma * noise`, and the model gives their velocity `noise - clean`. diffusers' own
`DPMSolverMultistepScheduler(use_flow_sigmas=True)` asks the model at integer timesteps, beside the sigmas that it
steps with. Here `timesteps` are `1000 * sigmas` in float32, never rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor


class FlowDPMSolverMultistepScheduler(SchedulerMixin, ConfigMixin):
    """DPM-Solver++ 2M in data prediction (arXiv 2211.01095, Algorithm 2) for rectified flow, or Euler's method.

    Takes the configuration of a `FlowMatchEulerDiscreteScheduler`, whose noise levels it has, to float32 rounding of
    their exact values; or that of a multistep scheduler with `flow_shift`, as Wan comes with.

    Args:
        num_train_timesteps: timestep of sigma 1.
        solver_order: 2, or 1 for Euler's method, which for rectified flow is DDIM.
        shift: constant s of `s * t / (1 + (s - 1) * t)` (arXiv 2403.03206, Eq. 23).
        use_dynamic_shifting: s is instead made from the `mu` that pipelines compute from the image's size, by the
            four figures that follow.
        time_shift_type: s is `exp(mu)` (exponential) or `mu` (linear).
        shift_terminal: the last noise level above 0, to which all are stretched.
        flow_shift: what multistep schedulers call `shift`; times then run from 1 evenly to 0.
    Raises:
        ValueError: another order, or a noise schedule that this scheduler does not have.
    """

    _compatibles = []
    order = 1  # model evaluations per step
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        solver_order: int = 2,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        shift_terminal: float | None = None,
        flow_shift: float | None = None,
        invert_sigmas: bool = False,
        stochastic_sampling: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
    ):
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order must be 1 (Euler) or 2 (DPM-Solver++ 2M), got {solver_order}")
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type must be exponential or linear, got {time_shift_type!r}")
        for name, wanted in (
            ("invert_sigmas", invert_sigmas),
            ("stochastic_sampling", stochastic_sampling),
            ("use_karras_sigmas", use_karras_sigmas),
            ("use_exponential_sigmas", use_exponential_sigmas),
            ("use_beta_sigmas", use_beta_sigmas),
        ):
            if wanted:
                raise ValueError(
                    f"{name} must be False here, got True; from_config(config, {name}=False) leaves it out"
                )
        self.num_inference_steps: int | None = None
        self.sigmas = self.timesteps = torch.empty(0)
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._levels: list[float] = []  # sigmas, for arithmetic that waits for no device
        self._history: tuple[float, Tensor] | None = None  # sigma and clean prediction of the step before

    @property
    def begin_index(self) -> int | None:
        """Index of the first step; None: the first step is found by its timestep."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first step."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this step: pipelines that start from an image leave out the first steps."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set `sigmas`, (K + 1,) float32 on the CPU, down to 0, and `timesteps`, (K,) float32 on the device.

        Args:
            num_inference_steps: K; may be left out where sigmas are given.
            sigmas: K noise levels before shift and without the 0; as in diffusers, the shift applies to them too.
            mu: what `use_dynamic_shifting` makes the shift from.
        Raises:
            ValueError: neither steps nor sigmas, numbers that do not agree, levels that do not decrease, no mu.
        """
        if sigmas is None and num_inference_steps is None:
            raise ValueError("set_timesteps needs num_inference_steps or sigmas, got neither")
        if sigmas is None:
            times = self._default_times(num_inference_steps or 0)
        else:
            times = torch.tensor([float(sigma) for sigma in sigmas], dtype=torch.float64)
            if num_inference_steps not in (None, len(times)):
                raise ValueError(f"sigmas must be num_inference_steps={num_inference_steps} values, got {len(times)}")
        levels = shifted(times, self._shift(mu)).float()
        if self.config["shift_terminal"] and len(levels) > 1:
            away = 1 - levels.double()
            levels = (1 - away * (1 - self.config["shift_terminal"]) / away[-1]).float()
        self.sigmas = torch.cat([levels, levels.new_zeros(1)])
        self._levels = self.sigmas.tolist()
        if not len(times) or self._levels[0] > 1 or not (self.sigmas.diff() < 0).all():
            raise ValueError(f"sigmas must decrease from at most 1 and stay above 0, got {self._levels[:-1]}")
        self.timesteps = (levels * self.config["num_train_timesteps"]).to(device)
        self.num_inference_steps = len(times)
        self._begin_index = self._step_index = self._history = None

    def _default_times(self, num_steps: int) -> Tensor:
        """(K,) times before the shift, from 1: to 1 / K, or to the lowest training level, which has its own shift."""
        lowest = torch.tensor(1 / self.config["num_train_timesteps"], dtype=torch.float64)
        if self.config["flow_shift"] is not None:
            lowest = torch.tensor(1 / max(num_steps, 1), dtype=torch.float64)
        elif not self.config["use_dynamic_shifting"]:
            lowest = shifted(lowest, self.config["shift"])
        return torch.linspace(1, lowest.item(), num_steps, dtype=torch.float64)

    def _shift(self, mu: float | None) -> float:
        """The shift s that `shifted` takes, made from `mu` where the shift is dynamic."""
        if not self.config["use_dynamic_shifting"]:
            return self.config["shift"] if self.config["flow_shift"] is None else self.config["flow_shift"]
        if mu is None:
            raise ValueError("set_timesteps needs mu where use_dynamic_shifting is True, got None")
        return mu if self.config["time_shift_type"] == "linear" else math.exp(mu)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take one step of the ODE with the solver of the configured order.

        First order at the first step and at a step to sigma 0, where the second-order term is 1/0.

        Args:
            model_output: (B, ...) velocity at the sample.
            timestep: one of `timesteps`; read where no `begin_index` is set.
            sample: (B, ...) latents.
            generator: not used: nothing is random here.
        Returns:
            The next latents, in the number type of model_output.
        Raises:
            ValueError: before `set_timesteps`, or a timestep that is none of its.
        """
        if self.num_inference_steps is None:
            raise ValueError("step needs timesteps: call set_timesteps first")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        sigma, sigma_next = self._levels[self._step_index : self._step_index + 2]
        self._step_index += 1
        precise = torch.promote_types(sample.dtype, torch.float32)
        latents, velocity = sample.to(precise), model_output.to(precise)
        if self.config["solver_order"] == 1:
            latents = latents + (sigma_next - sigma) * velocity
        else:
            target = clean = latents - sigma * velocity
            if self._history is not None and sigma_next > 0:
                sigma_before, clean_before = self._history
                # At sigma 1 the log-SNR is -inf, the weight 0: the second step is first order, as in the limit.
                past = log_snr(sigma) - log_snr(sigma_before)
                weight = 0.5 * (log_snr(sigma_next) - log_snr(sigma)) / past
                target = clean + weight * (clean - clean_before)
            ratio = sigma_next / sigma
            latents = ratio * latents + (1 - ratio) * target
            self._history = (sigma, clean) if sigma_next > 0 else None
        latents = latents.to(model_output.dtype)
        return SchedulerOutput(prev_sample=latents) if return_dict else (latents,)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Index of the step that begins at this timestep.

        Raises:
            ValueError: no step begins there.
        """
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (timesteps == torch.as_tensor(timestep, device=timesteps.device)).nonzero()
        if not len(found):
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {timestep}")
        return int(found[0])

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Latents at which sampling from an image begins: `(1 - sigma) * sample + sigma * noise`.

        Args:
            sample: (B, ...) clean latents.
            timestep: (B,) or (1,) of any noise level.
        """
        sigma = timestep.to(sample.device) / self.config["num_train_timesteps"]
        sigma = sigma.to(sample.dtype).view(-1, *[1] * (sample.ndim - 1))
        return sigma * noise + (1 - sigma) * sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Do what `scale_noise` does, by the name and in the order that some pipelines use."""
        return self.scale_noise(original_samples, timesteps, noise)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


def shifted(times: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] -> noise levels `s * t / (1 + (s - 1) * t)`, 0 and 1 kept (arXiv 2403.03206, Eq. 23)."""
    return shift * times / (1 + (shift - 1) * times)


def log_snr(sigma: float) -> float:
    """Log signal-to-noise ratio `log((1 - sigma) / sigma)`, -inf at pure noise."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
