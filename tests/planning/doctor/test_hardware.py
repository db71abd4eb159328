"""GPUs that are there, hidden, unusable or absent; the processor, memory and disks of this machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from ngrpo_lora.planning.doctor import hardware
from ngrpo_lora.planning.doctor.findings import Finding

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """`machine(cards=, build=, visible=)`: what nvidia-smi lists, what PyTorch is built for, and what it sees."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(cards: int, build: str | None, visible: int = 0) -> list[tuple[str, str]]:
        monkeypatch.setattr(hardware, "nvidia_cards", lambda: cards)
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        return [(finding.verdict, finding.text) for finding in hardware.cuda()]

    return make


def test_cuda_is_judged_by_what_is_there_and_what_pytorch_sees(machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "why_no_cuda", lambda: "driver too old")
    assert machine(1, "12.8", visible=1) == [("ok", "PyTorch for CUDA 12.8 can use one GPU")]
    assert machine(0, None) == [("note", "no GPU (a CPU build of PyTorch)")]
    assert machine(0, "12.8") == [("note", "no GPU (PyTorch for CUDA 12.8)")]
    assert machine(2, None) == [("problem", "PyTorch is a CPU build, and this machine has 2 GPUs")]
    assert machine(1, "12.8") == [("problem", "PyTorch for CUDA 12.8 cannot use one GPU: driver too old")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine(1, "12.8") == [("note", "CUDA_VISIBLE_DEVICES= hides one GPU")]


@pytest.mark.skipif(os.name == "nt", reason="nvidia-smi is a shell script here")
@pytest.mark.parametrize(
    ("script", "cards"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA H200 (UUID: GPU-2)'", 2),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9", 0),
    ],
)
def test_cards_are_counted_by_nvidia_smi(script: str, cards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.nvidia_cards() == cards
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    assert hardware.nvidia_cards() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pytorch_says_itself_why_it_has_no_gpu():
    assert hardware.why_no_cuda() not in ("", "it gives no reason")


def test_each_gpu_is_described(machine, monkeypatch: pytest.MonkeyPatch):
    machine(2, "12.8", visible=2)
    current = []

    @contextlib.contextmanager
    def device(i: int):
        current.append(i)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ((20 - i) * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(8, 9), (7, 5)][i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["NVIDIA L4", "Tesla T4"][i])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current[-1] == 0)
    assert [*hardware.gpus()] == [
        Finding("GPU 0", "ok", "NVIDIA L4, 20.0 of 24.0 GiB free, compute capability 8.9, bfloat16"),
        Finding(
            "GPU 1",
            "note",
            "Tesla T4, 19.0 of 24.0 GiB free, compute capability 7.5, no bfloat16",
            "leave model.dtype at auto, or take float16",
        ),
    ]


def test_the_processor_of_this_machine():
    (finding,) = hardware.processor()
    assert finding.verdict == "ok"
    assert torch.backends.cpu.get_cpu_capability() in finding.text
    assert f"threads: {torch.get_num_threads()}, " in finding.text


def test_amx_and_bfloat16_are_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True, "amx_bf16": True}, raising=False)
    (finding,) = hardware.processor()
    assert finding.text.endswith(", AMX, bfloat16")


def test_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * GIB, total=16 * GIB))
    assert [*hardware.memory()] == [Finding("memory", "ok", "3.0 of 16.0 GiB free")]


@pytest.mark.parametrize(("free", "verdict"), [(5 * GIB, "ok"), (5 * GIB - 1, "problem")])
def test_a_disk_needs_five_gib(free: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=free, total=100 * GIB)

    monkeypatch.setattr(hardware.shutil, "disk_usage", usage)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    (here,), (cache,) = hardware.disk(), hardware.hub_cache()
    assert (here.verdict, cache.verdict) == (verdict, verdict)
    assert here.text == cache.text == "5.0 of 100.0 GiB free"
    assert asked == [tmp_path, tmp_path]
    assert ("HF_HOME" in cache.remedy) == ("output_dir" in here.remedy) == (verdict == "problem")
