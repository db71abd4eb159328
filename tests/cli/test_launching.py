"""How many processes `ngrpo train` starts; what becomes of them is in test_launchers.py."""

from __future__ import annotations

import os

import pytest
import torch

from ngrpo_lora.cli.launching import process_count
from ngrpo_lora.errors import UserError


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert process_count("auto", None) == 2
    assert process_count("cuda", 1) == 1
    assert process_count("cuda:1", None) == 1
    assert process_count("cpu", 4) == 4
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert [process_count("cpu", None, on_cpu) for on_cpu in (1, 2, 5)] == [1, 2, 3]
    with pytest.raises(UserError, match=r"--num-processes must be at most the number of GPUs \(2\)"):
        process_count("auto", 3)
