"""One run as several processes: who owns which groups, how they agree, and how `ngrpo train` starts them.

Every process owns whole groups and computes what it can alone; scores and metrics are gathered, LoRA gradients are
summed. Because a number is the sum over all transitions wherever they were computed, and every random number is a
function of the run's seed and the group's position, a run does not depend on the number of processes but for the
order of float additions. DistributedDataParallel's hooks would instead need as many backward passes on every
process, which groups without advantages do not give.

accelerate makes the process group and carries every exchange. Started by `ngrpo train` itself, by `accelerate launch`
or by `torchrun`: all set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, check_cuda_p2p_ib_support, gather_object, reduce
from torch import Tensor, nn

from ngrpo_lora.errors import UserError, first_line
from ngrpo_lora.ranks import launched

__all__ = ["Processes", "base_is_sharded", "is_loss", "shard"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class Processes:
    """This process and its peers. Alone, every method is the identity."""

    def __init__(self, device: str = "cpu", timeout_s: float = 1800.0):
        """Meet the others, where a launcher started several.

        Args:
            device: `model.device`, resolved; GPUs exchange tensors over NCCL and all else over gloo.
            timeout_s: how long each waits for the others.
        Raises:
            UserError: they cannot meet, or the environment contradicts itself.
        """
        self.rank, self.count, self.timeout_s = 0, 1, timeout_s
        if not launched():
            return
        check_launcher()
        on_gpu = device.startswith("cuda")
        try:
            self.state = PartialState(
                cpu=not on_gpu, backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s)
            )
        except (RuntimeError, ValueError) as error:
            rank, size, address, port = map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
            raise UserError(
                f"process {rank} of {size} could not meet the others at {address}:{port} within trainer.timeout_s "
                f"({timeout_s:g} s: {first_line(error)}); have all machines started, is the port free, and the address "
                "reachable? choose another MASTER_PORT, --master-port or --main_process_port"
            ) from None
        self.rank, self.count = self.state.process_index, self.state.num_processes
        if self.count == 1:
            raise UserError(
                "processes on GPUs must be started by accelerate launch or torchrun, got one that mpirun started; "
                "accelerate joins those on a CPU alone"
            )

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def shares(self, total: int) -> list[range]:
        """`total` items as one consecutive part for each process; parts differ by one at most."""
        bounds = [total * rank // self.count for rank in range(self.count + 1)]
        return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]

    def share(self, total: int) -> range:
        """Which of `total` items are this process's: its part of `shares`."""
        return self.shares(total)[self.rank]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in their order, on every process; tensors should be on the CPU."""
        if self.count == 1:
            return [value]
        with self.contact():
            return gather_object([value])

    def broadcast(self, value: T) -> T:
        """The main process's value, on every process."""
        if self.count == 1:
            return value
        values: list[Any] = [value if self.is_main else None]
        with self.contact():
            return broadcast_object_list(values)[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one process; the same answer on all of them."""
        return any(self.gather(flag))

    def agree(self, problem: str | None) -> str | None:
        """The first problem that any process has, on every process, so that all stop together."""
        problems = self.gather(problem)
        for rank, found in enumerate(problems):
            if found is not None:
                same = all(other == found for other in problems)
                return found if same else f"process {rank} of {self.count}: {found}"
        return None

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over the processes, in one message."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self.contact():
            summed: Any = reduce(flat, "sum")
        for tensor, part in zip(tensors, summed.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Turn the loss of a peer, or waiting too long for one, into a message.

        Raises:
            UserError: a process has ended, or none answered within the timeout.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_loss(error):
                raise
            if re.search("time(d )?out", str(error), re.IGNORECASE):
                why = (
                    f"waited for the others longer than trainer.timeout_s ({self.timeout_s:g}); raise it, or speed up "
                    "what they wait for (a reward, most often)"
                )
            else:
                why = f"lost another process, whose own message says why ({first_line(error)})"
            raise UserError(f"process {self.rank} of {self.count} {why}; go on with resume=latest") from None

    def wait(self) -> None:
        """Wait until every process has come here; launchers end all others as soon as one has failed."""
        self.gather(None)

    def close(self) -> None:
        """Leave the others in order; without it they would report a lost connection."""
        if self.count > 1:
            self.state.destroy_process_group()


def check_launcher() -> None:
    """Make sure that nothing is asked of accelerate which only its own training loop could do.

    Raises:
        UserError: its configuration asks for DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "accelerate must start this run without DeepSpeed, but its configuration asks for that; give accelerate "
            "launch --multi_gpu or another --config_file, and use trainer.strategy=fsdp to share the base among GPUs"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        log.warning("accelerate's settings of FSDP are not used; trainer.strategy=fsdp shares the base among the GPUs")
    if torch.cuda.is_available() and not check_cuda_p2p_ib_support():  # as accelerate launch does
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")


def base_is_sharded(strategy: str, num_processes: int) -> bool:
    """Whether processes share the frozen base in pieces, so that each needs as many passes as any other."""
    return strategy == "fsdp" and num_processes > 1


def shard(
    transformer: nn.Module, blocks: Sequence[nn.Module], replicated: set[nn.Parameter], device: torch.device
) -> None:
    """Divide the frozen base among the processes (FSDP2), block by block; `replicated` stays whole everywhere.

    The base comes from system memory: no device ever holds more than its pieces and one whole block.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in replicated:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=replicated)
    fully_shard(transformer, mesh=mesh, ignored_params=replicated)


def is_loss(error: RuntimeError) -> bool:
    """Whether an error is the communication library's own: a peer is gone, or did not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
