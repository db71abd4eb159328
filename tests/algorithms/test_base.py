"""What the trainer promises of every algorithm: a resumed run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from flows import last_metrics, run_config
from safetensors.torch import load_file

from ngrpo_lora import registry
from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.training.setup import prepare
from ngrpo_lora.training.trainer import complete

SETTINGS = {
    "mix": ["algorithm.window_size=2", "algorithm.window_every=1"],
    "mix_flash": ["algorithm.window_size=2", "algorithm.window=random"],
    "branch": ["algorithm.split_every=2"],
    "neighbor": ["algorithm.num_anchors=2", "algorithm.num_train_steps=2"],
}


@pytest.mark.parametrize("algorithm", registry.names(registry.ALGORITHMS))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(algorithm: str, make_config: MakeConfig, tmp_path: Path):
    def run(folder: str, *settings: str) -> None:
        common = ["optimizer.learning_rate=1e-2", "evaluation.num_prompts=1", "evaluation.every=2"]
        own = SETTINGS.get(algorithm, [])
        complete(prepare(run_config(make_config, tmp_path / folder, algorithm, *common, *own, *settings)))

    run("whole", "trainer.num_iterations=2", "algorithm.updates_per_rollout=2")
    run("parts", "trainer.num_iterations=1", "algorithm.updates_per_rollout=2")
    run("parts", "trainer.num_iterations=2", "algorithm.updates_per_rollout=2", "resume=latest")
    adapters = [load_file(tmp_path / folder / "adapter" / FILE_NAME) for folder in ("whole", "parts")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert any(weight.any() for name, weight in adapters[0].items() if "lora_B" in name)
    rows = [last_metrics(tmp_path / folder) for folder in ("whole", "parts")]
    own = [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]
    assert own[0] == own[1]
