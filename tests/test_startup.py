"""How soon the command answers: help and refused configurations load neither torch nor what needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ngrpo_lora import registry

SAYS_WHAT_IT_LOADED = """
import json, sys
from ngrpo_lora.cli import app
try:
    app(sys.argv[1:], prog_name="ngrpo")
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "scipy", "huggingface_hub"}


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *(([command, "--help"], 0) for command in ("train", "sample", "compare", "plan", "config", "doctor")),
        *((["bench", command, "--help"], 0) for command in ("overhead", "gradient", "scaling", "paper")),
        (["bench", "paper", "--method", "neighbour"], 2),
        (["bench", "paper", "lora.rank=0"], 2),
        (["config"], 0),
        (["train", "rollout.num_steps=0"], 2),
        (["train", "rollout.nun_steps=8"], 2),
        (["train", "flux", "rollout.num_steps=0"], 2),
        (["train", "rewards=[{name: hpsv2, wieght: 1}]"], 2),
        (["train", "rewards=[{name: geneval, wieght: 1}]"], 2),
        (["train", "algorithm=flow_grpo", "algorithm.eta=0"], 2),
        (["train", "prompts.train=gone.txt", "prompts.held_out=gone.txt"], 2),
        (["train", "rewards=gone.py:score"], 2),
        (["train", "resume=latest", "output_dir=gone"], 2),
        (["bench", "gradient", "--vary", "rollout.num_steps=4,0"], 2),
        (["bench", "scaling", "rollout.num_steps=0"], 2),
        (["bench", "scaling", "--processes", "1,x"], 2),
        (["sample"], 2),
        (["compare"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_is_not_computed_loads_no_torch(words: list[str], status: int, tmp_path: Path):
    command = [sys.executable, "-c", SAYS_WHAT_IT_LOADED, *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == status, result.stderr
    assert not HEAVY & set(json.loads(result.stdout.splitlines()[-1]))
    if status:
        assert result.stderr.startswith("ngrpo: ")
    assert not [*tmp_path.iterdir()]


def test_the_settings_of_every_plugin_load_no_torch():
    code = (
        "import sys; from ngrpo_lora import registry; from ngrpo_lora.config.plugins import algorithm_settings\n"
        "from ngrpo_lora.config.plugins import reward_class\n"
        "for name in registry.names(registry.ALGORITHMS): algorithm_settings(name)\n"
        "for name in registry.names(registry.REWARDS): reward_class(name)\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_every_algorithm_has_its_settings_and_every_setting_its_algorithm():
    assert registry.names(registry.ALGORITHM_SETTINGS) == registry.names(registry.ALGORITHMS)
    assert set(registry.names(registry.REWARD_SETTINGS)) <= set(registry.names(registry.REWARDS))
    for name in registry.names(registry.ALGORITHMS):
        settings = registry.load(registry.ALGORITHM_SETTINGS, name).Config
        assert registry.load(registry.ALGORITHMS, name).Config is settings
        assert settings().name == name


def test_the_packages_names_load_when_they_are_used():
    code = (
        "import sys, ngrpo_lora; first = 'torch' in sys.modules; ngrpo_lora.euler; print(first, 'torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False True"
