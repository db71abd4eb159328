"""How many processes `ngrpo train` starts; what becomes of them is in test_launchers.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

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


def beside(folder: Path) -> list[str]:
    """Settings of a run that starts from an adapter which works beside a file that its base lacks."""
    layer, file = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight", folder / "beside.safetensors"
    header = {"model": {"path": "embedded", "fuse": {"x.safetensors": 1.0}}, "fused": {"x.safetensors": "ab"}}
    tensors = {layer.format("A"): torch.zeros(4, 128), layer.format("B"): torch.zeros(128, 4)}
    save_file(tensors, file, {"ngrpo": json.dumps(header)})
    return ["demo", f"lora.init_from={file}"]


def oblong(folder: Path) -> list[str]:
    """Settings of a run that edits pictures of which little is left as they are cropped."""
    Image.new("RGB", (300, 64), "red").save(folder / "a.png")
    (folder / "edits.csv").write_text("prompt,source\nmake the star blue,a.png\n")
    table = folder / "edits.csv"
    return ["demo-edit", f"prompts.train={table}", f"prompts.held_out={table}", "evaluation.num_prompts=1"]


@pytest.mark.parametrize(
    ("settings", "said"), [(beside, "works beside x.safetensors"), (oblong, "prompts.train: of 1 of 1 source pictures")]
)
def test_what_there_is_to_say_of_files_is_said_by_one_process_of_several(
    settings: Callable[[Path], list[str]], said: str, tmp_path: Path
):
    words = [
        *settings(tmp_path),
        "rollout.prompts_per_iteration=1",
        "algorithm.num_anchors=1",
        f"output_dir={tmp_path / 'run'}",
    ]
    command = [sys.executable, "-m", "ngrpo_lora", "train", *words, "--num-processes", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "must be at least the number of processes (2), got 1" in ended.stderr  # found by those that were started
    assert ended.stderr.count(said) == 1
    assert not (tmp_path / "run").exists()
