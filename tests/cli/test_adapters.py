"""`ngrpo info` and `export` as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refuse, run
from conftest import FinishedRun
from pictures import pixels

from ngrpo_lora.adapters.reading import read_adapter_file, read_metadata


def test_info_says_all_of_an_adapter_of_ours(adapter: Path, finished_run: FinishedRun):
    (said,) = json.loads("\n".join(run("info", adapter.parents[1], "--json")))
    assert said["family"] == "flux"
    assert said["base"] == "embedded"
    assert said["ranks"] == {"4": sum(said["layers"].values())}
    assert said["layers"] == {"attention": 17, "feed-forward": 10}
    assert said["alpha"] == {"scales": [1.0], "source": "header", "folded": True}
    assert said["readers"] == ["diffusers", "comfyui"]
    assert said["dtype"] == "float32"
    assert said["settings"]["num_steps"] == 4
    assert said["settings"]["shift"] == finished_run.run.family.shift(4)
    assert said["held_out"]["iteration"] == 4
    assert said["held_out"]["before"]["reward_mean"] != said["held_out"]["after"]["reward_mean"]
    deltas = torch.cat([layer.delta().double().flatten() for layer in read_adapter_file(adapter).layers.values()])
    assert said["norm"] == pytest.approx(deltas.norm().item(), rel=1e-5)
    assert run(*said["draw"].replace('"..."', "star").split()[1:], "--output", adapter.parents[1] / "drawn")
    shown = "\n".join(run("info", adapter))
    for part in ("trainer", "flux", "4 (27 layers)", "folded in", "17 attention, 10 feed-forward", "num_steps 4"):
        assert part in shown


def test_export_writes_beside_the_adapter_and_the_run_still_draws_with_its_own(adapter: Path, tmp_path: Path):
    folder = Path(shutil.copytree(adapter.parents[1], tmp_path / "run"))
    (written,) = run("export", folder, "--format", "comfyui")
    assert Path(written) == folder / "adapter" / "pytorch_lora_weights-comfyui.safetensors"
    assert read_metadata(written)["ngrpo"] == read_metadata(adapter)["ngrpo"]
    words = ["-p", "a red star", "--output"]
    (own,) = run("sample", "--adapter", folder, *words, tmp_path / "own")
    (converted,) = run("sample", "--adapter", written, *words, tmp_path / "converted")
    assert np.array_equal(pixels(own), pixels(converted))
    assert "--format must be diffusers, comfyui or kohya, got 'a1111'" in refuse("export", folder, "--format", "a1111")
    assert "--format kohya needs the width of FLUX.1, 3072" in refuse("export", folder, "--format", "kohya")
