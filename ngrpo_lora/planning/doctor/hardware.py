"""GPUs, processor, memory and disks, as PyTorch and the system see them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ngrpo_lora.errors import first_line
from ngrpo_lora.planning.doctor.findings import Finding

__all__ = ["cuda", "disk", "gpus", "hub_cache", "memory", "processor"]

GIB = 2**30
LEAST_FREE_GIB = 5
NVIDIA_SMI_S = 20


def cuda() -> Iterator[Finding]:
    """Whether PyTorch computes on the GPUs that are there."""
    import torch

    runtime = torch.version.cuda and f"CUDA {torch.version.cuda}" or torch.version.hip and f"ROCm {torch.version.hip}"
    if torch.cuda.is_available():
        yield Finding("CUDA", "ok", f"PyTorch for {runtime} can use {counted(torch.cuda.device_count())}")
    elif torch.backends.mps.is_available():
        yield Finding("CUDA", "ok", "none; PyTorch can use this Apple GPU")
    elif (cards := nvidia_cards()) == 0:
        text = f"no GPU ({f'PyTorch for {runtime}' if runtime else 'a CPU build of PyTorch'})"
        yield Finding("CUDA", "note", text, "train the embedded model here; the others need a GPU")
    elif runtime is None:
        text = f"PyTorch is a CPU build, and this machine has {counted(cards)}"
        yield Finding("CUDA", "problem", text, "install its CUDA build: https://pytorch.org/get-started/locally/")
    elif (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        text = f"CUDA_VISIBLE_DEVICES={hidden} hides {counted(cards)}"
        yield Finding("CUDA", "note", text, "unset it to use a GPU")
    else:
        text = f"PyTorch for {runtime} cannot use {counted(cards)}: {why_no_cuda()}"
        yield Finding("CUDA", "problem", text, "update the NVIDIA driver, or install a build for an older CUDA")


def counted(cards: int) -> str:
    return "one GPU" if cards == 1 else f"{cards} GPUs"


def nvidia_cards() -> int:
    """The number of NVIDIA GPUs in this machine, whether PyTorch can use them or not."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return 0
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def why_no_cuda() -> str:
    """What PyTorch says when it is made to use a GPU."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return first_line(error)
    return "it gives no reason"


def gpus() -> Iterator[Finding]:
    """Each GPU: name, memory, compute capability, and whether it computes in bfloat16."""
    import torch

    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        with torch.cuda.device(i):
            bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        seen = f"{torch.cuda.get_device_name(i)}, {sizes(free, total)}, compute capability {major}.{minor}"
        if bfloat16:
            yield Finding(f"GPU {i}", "ok", f"{seen}, bfloat16")
        else:
            yield Finding(f"GPU {i}", "note", f"{seen}, no bfloat16", "leave model.dtype at auto, or take float16")


def processor() -> Iterator[Finding]:
    """Cores, and the vector instructions that PyTorch uses on them."""
    import torch

    from ngrpo_lora.devices import resolve_dtype

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_tile", False)  # PyTorch 2.6 has none
    bfloat16 = resolve_dtype("auto", "cpu") == "bfloat16"
    instructions = f"{torch.backends.cpu.get_cpu_capability()}, {'AMX' if amx else 'no AMX'}"
    text = f"cores: {cores}, threads: {torch.get_num_threads()}, {instructions}, "
    yield Finding("CPU", "ok", f"{text}{'bfloat16' if bfloat16 else 'no bfloat16'}")


def memory() -> Iterator[Finding]:
    """How much memory the system has, and how much of it is free."""
    import psutil

    found = psutil.virtual_memory()
    yield Finding("memory", "ok", sizes(found.available, found.total))


def disk() -> Iterator[Finding]:
    """Room for a run in the current folder."""
    yield room("disk, here", Path.cwd(), "set output_dir to a folder on another disk")


def hub_cache() -> Iterator[Finding]:
    """Room for downloads of the Hub."""
    from huggingface_hub import constants

    yield room("disk, Hub cache", Path(constants.HF_HUB_CACHE).absolute(), "set HF_HOME to a folder on another disk")


def room(check: str, folder: Path, other: str) -> Finding:
    """The verdict on the free space of the disk on which a folder is, or will be."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    used = shutil.disk_usage(there)
    if used.free < LEAST_FREE_GIB * GIB:
        return Finding(check, "problem", sizes(used.free, used.total), f"make {LEAST_FREE_GIB} GiB of room, or {other}")
    return Finding(check, "ok", sizes(used.free, used.total))


def sizes(free: int, total: int) -> str:
    return f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
