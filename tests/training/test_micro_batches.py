"""Micro-batches are halved where memory runs out, and the run comes to the same."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from runs import adapter_weights, read_rows
from torch import nn

from ngrpo_lora.errors import OutOfMemory
from ngrpo_lora.training.micro_batches import MicroBatch
from ngrpo_lora.training.run import Run
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete

LACK = "CUDA out of memory. Tried to allocate 1.21 GiB.\nSee documentation"


def needing(limit: int, error: Exception, tried: list[int]) -> Callable[[int], str]:
    def work(size: int) -> str:
        tried.append(size)
        if size > limit:
            raise error
        return f"{size} at once"

    return work


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(LACK),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ],
)
def test_the_size_is_halved_until_it_fits_and_stays(error: Exception, caplog: pytest.LogCaptureFixture):
    batch, tried = MicroBatch("trainer.micro_batch_size", 12), []
    with caplog.at_level(logging.WARNING):
        assert batch.fit(needing(3, error, tried)) == "3 at once"
        assert batch.fit(needing(3, error, tried)) == "3 at once"
    assert tried == [12, 6, 3, 3]
    assert [line.partition(" (")[0] for line in caplog.messages] == [
        "out of memory with trainer.micro_batch_size=12",
        "out of memory with trainer.micro_batch_size=6",
    ]
    assert "trainer.micro_batch_size=3 saves the attempt next time" in caplog.text


@pytest.mark.parametrize(("size", "is_fixed"), [(1, False), (8, True)])
def test_where_nothing_can_be_halved_the_remedies_are_named(size: int, is_fixed: bool):
    work = needing(0, torch.OutOfMemoryError(LACK), tried := [])
    with pytest.raises(OutOfMemory, match=r"must fit into memory, but \d does not \(CUDA out of .*1.21 GiB.\); most"):
        MicroBatch("trainer.micro_batch_size", size, is_fixed).fit(work)
    assert tried == [size]


def test_another_error_is_not_taken_for_a_lack_of_memory():
    error = RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    with pytest.raises(RuntimeError, match="must match"):
        MicroBatch("trainer.micro_batch_size", 8).fit(needing(0, error, tried := []))
    assert tried == [8]


def test_the_memory_of_this_machine_really_runs_out():
    """A process that may have 512 MiB more than it has fills as many of them as fit, and no more."""
    pytest.importorskip("resource")
    if not sys.platform.startswith("linux"):
        pytest.skip("the limit of a process's address space holds on Linux")
    program = """
import logging, resource
import torch
from ngrpo_lora.training.micro_batches import MicroBatch
logging.basicConfig()
batch = MicroBatch("trainer.micro_batch_size", 64)
batch.fit(lambda size: torch.zeros(1))  # imports what it needs
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 512 * 2**20,) * 2)
filled = batch.fit(lambda size: torch.ones(size, 2**25 // 4))  # 32 MiB each, at most 16 of them
print(batch.size, filled.sum().item() == batch.size * 2**25 // 4)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["8", "True"], ["16", "True"])
    assert "DefaultCPUAllocator: can't allocate memory" in done.stderr


SETTINGS = ("trainer.num_iterations=2", "evaluation.every=1")
SIZES = {"rollout": 2, "trainer": 2, "evaluation": 1}


def sizes(**other: int) -> list[str]:
    return [f"{section}.micro_batch_size={size}" for section, size in (SIZES | other).items()]


def phase(run: Run) -> str:
    if torch.is_grad_enabled():
        return "gradients"
    if run.kept is not None:
        return "old velocities"
    return "rollout" if run.counter.active else "evaluation"


def run_out(run: Run, where: str, size: int) -> None:
    """Let passes of a phase with more samples run out of memory, those with gradients as late as they can.

    That is in the backward pass, where gradients of some layers have been added already.
    """

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if phase(run) == where != "gradients" and len(kwargs["hidden_states"]) > size:
            raise torch.OutOfMemoryError(LACK)

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if phase(run) == where == "gradients" and len(kwargs["hidden_states"]) > size:
            hooks.append(next(iter(run.lora_step.parameters.values())).register_post_accumulate_grad_hook(fail))

    def fail(parameter: torch.Tensor) -> None:
        hooks.pop().remove()
        raise torch.OutOfMemoryError(LACK)

    hooks: list[Any] = []
    run.family.transformer.register_forward_pre_hook(before, with_kwargs=True)
    run.family.transformer.register_forward_hook(after, with_kwargs=True)


@pytest.mark.parametrize(
    ("where", "section", "updates"),
    [
        ("rollout", "rollout", 1),
        ("evaluation", "evaluation", 1),
        ("gradients", "trainer", 1),
        ("old velocities", "trainer", 2),
    ],
)
def test_a_run_that_runs_out_of_memory_ends_bit_for_bit_as_one_with_small_micro_batches(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str, section: str, updates: int
):
    settings = [*SETTINGS, f"algorithm.updates_per_rollout={updates}"]
    complete(prepare(make_config(small := tmp_path / "small", *settings, *sizes())))
    run = prepare(make_config(large := tmp_path / "large", *settings, *sizes(**{section: 2 * SIZES[section]})))
    run_out(run, where, SIZES[section])
    with caplog.at_level(logging.WARNING):
        complete(run)
    (said,) = [line for line in caplog.messages if line.startswith("out of memory")]
    assert f"{section}.micro_batch_size={2 * SIZES[section]} (CUDA out of memory." in said
    assert torch.equal(adapter_weights(large), adapter_weights(small))
    assert without_costs(read_rows(large)) == without_costs(read_rows(small))


def without_costs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without times and function evaluations, of which the attempt has cost some."""
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "nfe/"))} for row in rows]


def test_a_run_that_cannot_go_on_leaves_a_checkpoint(make_config: MakeConfig, tmp_path: Path):
    run = prepare(make_config(tmp_path, *SETTINGS, *sizes()))

    def fail(module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and run.iteration == 1:
            raise torch.OutOfMemoryError(LACK)

    run.family.transformer.register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemory, match="trainer.micro_batch_size must fit into memory, but 1 does not"):
        complete(run)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000001"]
