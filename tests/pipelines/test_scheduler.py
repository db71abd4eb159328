"""`FlowDPMSolverMultistepScheduler`: the trainer's solver by diffusers' conventions, and its order on a known flow."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from ngrpo_lora.equations.solvers import SOLVERS, flow_sigmas, shifted, stretch_to_terminal

FILE = Path(__file__).parents[2] / "pipelines" / "scheduling_flow_dpm.py"
ORDER = {"dpmpp_2m": 2, "euler": 1}

# Of FLUX.1-dev, Qwen-Image and Stable Diffusion 3.5, as their repositories have them.
FLUX: dict[str, Any] = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
QWEN: dict[str, Any] = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
QWEN |= {"shift_terminal": 0.02}
SD3: dict[str, Any] = {"shift": 3.0}


def load_scheduler() -> Any:
    """The class, from its file alone."""
    spec = importlib.util.spec_from_file_location("scheduling_flow_dpm", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FlowDPMSolverMultistepScheduler


Scheduler = load_scheduler()


def given_times(num_steps: int) -> list[float]:
    """What most pipelines pass as `sigmas`."""
    return np.linspace(1.0, 1 / num_steps, num_steps).tolist()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def curved(latents: Tensor, sigma: float) -> Tensor:
    """A velocity that depends on both."""
    return torch.sin(3 * latents) * (1 + sigma) - latents * sigma


def loop(scheduler: Any, velocity_fn: Callable[[Tensor, float], Tensor], latents: Tensor) -> list[Tensor]:
    """What a pipeline does, with the velocity at the exact noise levels."""
    path = [latents]
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        path.append(scheduler.step(velocity_fn(path[-1], sigma), timestep, path[-1], return_dict=False)[0])
    return path


# The trainer's


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_latent_is_the_trainers_to_the_bit(solver: str, num_steps: int, shift: float):
    scheduler = Scheduler(shift=shift, solver_order=ORDER[solver])
    scheduler.set_timesteps(sigmas=given_times(num_steps))
    noise = torch.randn(2, 4, 8, 8)
    expected = SOLVERS[solver](curved, noise, flow_sigmas(num_steps, shift))
    for latents, other in zip(loop(scheduler, curved, noise), expected, strict=True):
        assert torch.equal(latents, other)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 8, 20, 50])
def test_noise_levels_are_the_trainers_to_the_bit(num_steps: int):
    static, dynamic, terminal, sd3, wan = (
        Scheduler.from_config(config)
        for config in (
            FlowMatchEulerDiscreteScheduler(shift=6.0).config,
            FlowMatchEulerDiscreteScheduler(**FLUX).config,
            FlowMatchEulerDiscreteScheduler(**QWEN).config,
            FlowMatchEulerDiscreteScheduler(**SD3).config,
            UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).config,
        )
    )
    static.set_timesteps(num_steps, sigmas=given_times(num_steps))
    assert torch.equal(static.sigmas, flow_sigmas(num_steps, 6.0))
    dynamic.set_timesteps(sigmas=given_times(num_steps), mu=0.8)
    assert torch.equal(dynamic.sigmas, flow_sigmas(num_steps, math.exp(0.8)))
    terminal.set_timesteps(sigmas=given_times(num_steps), mu=0.6)
    assert torch.equal(terminal.sigmas, stretch_to_terminal(flow_sigmas(num_steps, math.exp(0.6)), 0.02))
    wan.set_timesteps(num_steps)
    assert torch.equal(wan.sigmas, flow_sigmas(num_steps, 3.0))
    sd3.set_timesteps(num_steps)
    lowest = shifted(torch.tensor(1e-3, dtype=torch.float64), 3.0).item()
    times = torch.linspace(1, lowest, num_steps, dtype=torch.float64)
    assert torch.equal(sd3.sigmas, torch.cat([shifted(times, 3.0), times.new_zeros(1)]).float())


# diffusers'


@pytest.mark.parametrize(
    ("config", "call"),
    [
        (SD3, {}),
        (SD3, {"sigmas": given_times(8)}),
        (FLUX, {"sigmas": given_times(8), "mu": 0.7}),
        (FLUX, {"mu": 0.7}),
        (FLUX | {"time_shift_type": "linear"}, {"sigmas": given_times(8), "mu": 1.7}),
        (QWEN, {"sigmas": given_times(8), "mu": 0.7}),
    ],
)
def test_noise_levels_and_euler_steps_are_those_of_diffusers(config: dict[str, Any], call: dict[str, Any]):
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    ours = Scheduler.from_config(theirs.config, solver_order=1)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8, **call)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=3e-7, atol=1e-4)
    noise = torch.randn(1, 4, 8, 8)
    assert relative_error(loop(ours, curved, noise)[-1], loop(theirs, curved, noise)[-1]) < 1e-6


def test_sigma_and_timestep_are_one_number():
    scheduler = Scheduler(shift=3.0)
    scheduler.set_timesteps(28)
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
    assert torch.equal(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    assert (scheduler.timesteps.diff() < 0).all()
    assert scheduler.sigmas[-1] == 0
    assert (scheduler.timesteps != scheduler.timesteps.round()).sum() > 20


def test_a_configuration_is_saved_and_loaded(tmp_path: Path):
    scheduler = Scheduler.from_config(FlowMatchEulerDiscreteScheduler(**QWEN).config, solver_order=1)
    scheduler.save_pretrained(tmp_path)
    loaded = Scheduler.from_pretrained(tmp_path)
    hidden = {"_use_default_values": None}
    assert {**loaded.config, **hidden} == {**scheduler.config, **hidden}
    assert (loaded.config.solver_order, loaded.config.shift_terminal) == (1, 0.02)
    back: Any = FlowMatchEulerDiscreteScheduler.from_config(loaded.config)
    assert (back.config.max_shift, back.config.use_dynamic_shifting) == (0.9, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_keeps_shape_and_dtype_and_computes_in_float32(dtype: torch.dtype):
    scheduler, precise = Scheduler(), Scheduler()
    noise, velocities = torch.randn(2, 3, 4, 5).to(dtype), [torch.randn(2, 3, 4, 5).to(dtype) for _ in range(4)]
    for each in (scheduler, precise):
        each.set_timesteps(4)
    for timestep, velocity in zip(scheduler.timesteps, velocities, strict=True):
        result = scheduler.step(velocity, timestep, noise)
        exact = precise.step(velocity.float(), timestep, noise.float(), return_dict=False)[0]
        assert (result.prev_sample.shape, result.prev_sample.dtype) == (noise.shape, dtype)
        assert torch.equal(result.prev_sample, exact.to(dtype))
        noise = result.prev_sample


def test_a_run_does_not_remember_an_earlier_one_that_was_broken_off():
    scheduler, noise = Scheduler(shift=3.0), torch.randn(1, 4, 8, 8)
    scheduler.set_timesteps(6)
    first = loop(scheduler, curved, noise)[-1]
    scheduler.set_timesteps(6)
    for timestep in scheduler.timesteps[:3]:
        scheduler.step(noise, timestep, noise)
    scheduler.set_timesteps(6)
    assert torch.equal(loop(scheduler, curved, noise)[-1], first)


def test_a_run_from_the_middle_begins_with_a_first_order_step():
    sigmas, noise = flow_sigmas(8, 3.0), torch.randn(1, 4, 8, 8)
    expected = SOLVERS["dpmpp_2m"](curved, noise, sigmas[3:])[-1]
    for set_begin_index in (True, False):
        scheduler = Scheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=given_times(8))
        if set_begin_index:
            scheduler.set_begin_index(3)
        latents = noise
        for timestep in scheduler.timesteps[3:]:
            latents = scheduler.step(curved(latents, timestep.item() / 1000), timestep, latents).prev_sample
        assert scheduler.step_index == 8
        assert relative_error(latents, expected) < 1e-6


def test_an_image_is_noised_to_any_level():
    scheduler = Scheduler(shift=3.0)
    scheduler.set_timesteps(8)
    image, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    timesteps, sigmas = scheduler.timesteps[[2, 5]], scheduler.sigmas[[2, 5]].view(2, 1, 1, 1)
    expected = (1 - sigmas) * image + sigmas * noise
    torch.testing.assert_close(scheduler.scale_noise(image, timesteps, noise), expected)
    torch.testing.assert_close(scheduler.add_noise(image, noise, timesteps), expected)
    assert torch.equal(scheduler.scale_noise(image, scheduler.timesteps[:1], noise), noise)


@pytest.mark.parametrize(
    ("config", "call", "message"),
    [
        ({}, {}, "needs num_inference_steps or sigmas"),
        ({}, {"num_inference_steps": 0}, "sigmas must decrease from at most 1"),
        ({}, {"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "must be num_inference_steps=3 values, got 2"),
        ({}, {"sigmas": [0.5, 0.7]}, r"sigmas must decrease from at most 1 and stay above 0, got \[0.5, 0.69"),
        ({}, {"sigmas": [1.0, 0.0]}, "sigmas must decrease"),
        ({}, {"sigmas": [1.0, math.nan]}, "sigmas must decrease"),
        ({}, {"sigmas": [999.0, 500.0]}, "sigmas must decrease from at most 1"),
        ({"shift": 0.0}, {"num_inference_steps": 4}, "sigmas must decrease"),
        ({"use_dynamic_shifting": True}, {"num_inference_steps": 4}, "needs mu where use_dynamic_shifting is True"),
    ],
)
def test_a_schedule_that_cannot_be_is_an_error(config: dict[str, Any], call: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Scheduler(**config).set_timesteps(**call)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"solver_order": 3}, "solver_order must be 1 .* or 2 .*, got 3"),
        ({"time_shift_type": "cubic"}, "time_shift_type must be exponential or linear, got 'cubic'"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas must be False here, got True"),
        ({"invert_sigmas": True}, "invert_sigmas must be False here"),
    ],
)
def test_a_configuration_that_is_not_had_is_an_error(config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Scheduler(**config)


def test_a_step_needs_timesteps_and_one_of_them():
    scheduler, latents = Scheduler(), torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(latents, 1000.0, latents)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"must be one of scheduler.timesteps, got 3"):
        scheduler.step(latents, 3, latents)


# The order. Data are a Gaussian N(MEAN, STD^2), for which the velocity and its integral are known.

MEAN, STD = 0.5, 1.0


def spread(sigma: float) -> float:
    """Standard deviation of latents."""
    return math.hypot((1 - sigma) * STD, sigma)


def gaussian_velocity(latents: Tensor, sigma: float) -> Tensor:
    """`E[noise - clean | latents]`."""
    standard = (latents - (1 - sigma) * MEAN) / spread(sigma) ** 2
    return sigma * standard - (MEAN + (1 - sigma) * STD**2 * standard)


def gaussian_flow(latents: Tensor, sigma: float, sigma_end: float) -> Tensor:
    """Where the ODE leads."""
    return (1 - sigma_end) * MEAN + spread(sigma_end) / spread(sigma) * (latents - (1 - sigma) * MEAN)


def error(scheduler: Any, times: Sequence[float], last: int = -1) -> float:
    """Of the latents at the last noise level but one, or at the last (0), in float64."""
    latents = torch.linspace(-2, 2, 41, dtype=torch.float64)
    scheduler.set_timesteps(sigmas=times)
    sigmas = scheduler.sigmas.tolist()
    path = loop(scheduler, gaussian_velocity, latents)
    end = len(sigmas) - 1 + last
    return (path[end] - gaussian_flow(latents, sigmas[0], sigmas[end])).square().mean().sqrt().item()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_solver_is_of_second_order_and_eulers_of_first(shift: float):
    """Between times 0.95 and 0.05, within which steps of log-SNR shrink as steps become more."""
    counts = (32, 64, 128, 256)
    for solver, low, high in (("dpmpp_2m", 1.9, 2.4), ("euler", 0.95, 1.05)):
        errors = [
            error(Scheduler(shift=shift, solver_order=ORDER[solver]), np.linspace(0.95, 0.05, count + 1).tolist())
            for count in counts
        ]
        slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
        assert all(low <= slope <= high for slope in slopes), slopes


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_from_noise_to_image_the_error_falls_faster_than_linearly(shift: float):
    """At sigma 1 and 0 the log-SNR is infinite, and the slope nears 2 from below, as log(K) / K^2."""
    counts = (4, 8, 16, 64, 256)
    second = [error(Scheduler(shift=shift), given_times(count), 0) for count in counts]
    first = [error(Scheduler(shift=shift, solver_order=1), given_times(count), 0) for count in counts]
    assert all(ours < euler for ours, euler in zip(second, first, strict=True))
    assert math.log(second[0] / second[-1], counts[-1] / counts[0]) > 1.6 > 1.1 > math.log(first[0] / first[-1], 64)


@pytest.mark.parametrize("num_steps", [4, 8, 16])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_solver_is_ours_but_for_its_integer_timesteps(shift: float, num_steps: int):
    def theirs(exact: bool) -> Tensor:
        scheduler: Any = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
        )
        scheduler.set_timesteps(num_steps)
        levels = scheduler.sigmas if exact else scheduler.timesteps / 1000
        latents = noise
        for timestep, level in zip(scheduler.timesteps, levels, strict=False):
            latents = scheduler.step(curved(latents, level.item()), timestep, latents).prev_sample
        sigmas.append(scheduler.sigmas[:-1].tolist())
        return latents

    noise, sigmas = torch.randn(1, 4, 16, 16), []
    exact, rounded = theirs(True), theirs(False)
    scheduler = Scheduler()
    scheduler.set_timesteps(sigmas=sigmas[0])
    ours = loop(scheduler, curved, noise)[-1]
    assert relative_error(exact, ours) < 2e-6
    assert relative_error(rounded, ours) > 1e-4
