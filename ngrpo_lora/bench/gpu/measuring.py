"""Measures one row of a part, on a model of the configured shape with random weights."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import ngrpo_lora
from ngrpo_lora.bench.bare import in_turn, opened, timed, whole_iteration
from ngrpo_lora.bench.gpu.parts import Kind
from ngrpo_lora.config import RunConfig
from ngrpo_lora.devices import resolve_dtype
from ngrpo_lora.equations.noise import gaussian_noise
from ngrpo_lora.errors import UserError
from ngrpo_lora.models._blueprint import random_family
from ngrpo_lora.planning.plan import GIB, make_plan
from ngrpo_lora.planning.sizes import optimizer_sizes
from ngrpo_lora.planning.sketch import sketch
from ngrpo_lora.training.export import check_export, save_adapter
from ngrpo_lora.training.metering import STAGES
from ngrpo_lora.training.optimizers import make_optimizer
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.trainer import iterate
from ngrpo_lora.types import Metrics

__all__ = ["MEASURES", "Found", "covered", "pytest_counts"]

Found = dict[str, float | None]
"""Figures by name, with their units; None is what cannot be measured on this device."""

ITERATIONS = 1
"""Timed iterations, after one that warms up: a GPU's budget is minutes."""
STEPS = 5
"""Timed steps of an optimizer, after one that makes its state."""

BUSY = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
"""Categories of a trace's events during which the device works."""


def measure_iteration(config: RunConfig) -> Found:
    """An iteration in turn with its bare calls, the share of it in which the device waits, and its memory."""
    with opened(config, random_family(config.model)) as run:
        found = in_turn(run, ITERATIONS)
        waits, metrics = profiled(run)
    seconds: Found = {f"{stage}_s": found.iteration[stage].wall for stage in STAGES}
    whole = {"iteration_s": found.iteration["all"].wall, "bare_s": found.calls["all"].wall, "waits": waits}
    return seconds | whole | counted(config, metrics) | memory(config, metrics)


def measure_pace(config: RunConfig) -> Found:
    """Iterations alone: their median time, their function evaluations and their memory."""
    with opened(config, random_family(config.model)) as run:
        metrics = iterate(run)
        seconds = [whole_iteration(run) for _ in range(ITERATIONS)]
    stages: Found = {f"{stage}_s": statistics.median(row[stage].wall for row in seconds) for stage in STAGES}
    whole: Found = {"iteration_s": statistics.median(row["all"].wall for row in seconds)}
    return stages | whole | counted(config, metrics) | memory(config, metrics)


def counted(config: RunConfig, metrics: Metrics) -> Found:
    """Samples of an iteration, and the function evaluations that the trainer's hook has counted for each."""
    samples = config.rollout.prompts_per_iteration * config.rollout.group_size
    return {"samples": samples} | {f"{kind}_per_sample": metrics[f"nfe/{kind}_per_sample"] for kind in ("old", "theta")}


def memory(config: RunConfig, metrics: Metrics) -> Found:
    """Most GiB that tensors took in rollout and update, that PyTorch reserved, and the plan's for these stages."""
    plan = make_plan(config)
    planned = {stage: sum(plan.gpu[stage].values()) / GIB for stage in ("rollout", "decode", "update")}
    return {
        "rollout_gib": metrics.get("memory/rollout_gib"),
        "update_gib": metrics.get("memory/update_gib"),
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else None,
        "plan_rollout_gib": max(planned["rollout"], planned["decode"]),
        "plan_update_gib": planned["update"],
    }


def profiled(run: Run) -> tuple[float, Metrics]:
    """An iteration under PyTorch's profiler: the share of its time in which the device does nothing, and its metrics.

    On a CPU it is the share in which no operator of PyTorch runs.
    """
    device = run.family.device.type
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        start = time.perf_counter()
        metrics = iterate(run)  # to the end of what the device was asked for
        wall = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(trace := Path(folder) / "trace.json"))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    busy = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in BUSY[device]]
    return 1 - covered(busy) / 1e6 / wall, metrics


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what spans, each from a start to an end, cover together; where they overlap it counts once."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def measure_optimizer(config: RunConfig) -> Found:
    """A step of the optimizer on weights of the adapter's sizes, without a model, and the state that it keeps."""
    model, on_gpu = config.model, torch.cuda.is_available()
    dtype = resolve_dtype(model.dtype, model.device)
    sizes = sketch(model.model_copy(update={"dtype": dtype}), config.lora).lora
    weights = [nn.Parameter(torch.zeros(size, device=model.device)) for size in sizes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = make_optimizer(config.optimizer, weights)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    optimizer.step()
    state = torch.cuda.memory_allocated() - before if on_gpu else None
    seconds = statistics.median(timed(optimizer.step).wall for _ in range(STEPS))
    planned, paged = optimizer_sizes(config.optimizer, sizes)
    return {
        "elements": sum(sizes),
        "step_s": seconds,
        "state_gib": None if state is None else state / GIB,
        "plan_state_gib": planned / GIB,
        "plan_paged_gib": paged / GIB,
    }


def measure_export(config: RunConfig) -> Found:
    """An adapter that an iteration has moved, written, and loaded by diffusers' own pipeline on the same device.

    Raises:
        RuntimeError: it gives other velocities there.
    """
    with opened(config, random_family(config.model)) as run:
        iterate(run)
        start, path = time.perf_counter(), run.output_dir / "adapter.safetensors"
        save_adapter(path, run.family, run.config)
        text = run.family.encode([run.held_out[0]])
        latents = gaussian_noise((1, *run.family.latent_shape), 0).to(run.family.device)
        try:
            difference = check_export(path, run.family, text, latents)
        except UserError as error:  # here a failure, and nothing that this machine lacks
            raise RuntimeError(str(error)) from error
        seconds, size = time.perf_counter() - start, path.stat().st_size
    return {"difference": difference, "check_s": seconds, "file_mib": size / 2**20}


def measure_tests(config: RunConfig) -> Found:
    """The tests that are marked `gpu`, where this package is a source tree.

    Raises:
        UserError: there is no GPU, no pytest or no tests.
    """
    if not torch.cuda.is_available():
        raise UserError("tests that are marked gpu need a CUDA device")
    root = Path(ngrpo_lora.__file__).parents[1]
    if find_spec("pytest") is None or not (root / "tests").is_dir():
        raise UserError("tests need pytest and the folder tests/ of a source tree: make env")
    return pytest_counts(root, "-m", "gpu")


def pytest_counts(folder: Path, *words: str) -> Found:
    """Run pytest in a folder, and count what has passed, failed and been skipped.

    Raises:
        UserError: there was nothing to run.
    """
    with tempfile.TemporaryDirectory() as aside:
        report = Path(aside) / "report.xml"
        ended = subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *words], cwd=folder)
        if ended.returncode not in (0, 1):
            raise UserError(f"pytest ended with status {ended.returncode}; the part's log says why")
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
        counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"], "tests_s": float(suite.attrib["time"])}


MEASURES: dict[Kind, Callable[[RunConfig], Any]] = {
    "iteration": measure_iteration,
    "pace": measure_pace,
    "optimizer": measure_optimizer,
    "export": measure_export,
    "tests": measure_tests,
}
"""What measures a row, by the kind of its part."""
