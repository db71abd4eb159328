"""What several test files share: two threads, and runs of the embedded model small enough for a test."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ngrpo_lora.config import RunConfig, load_config

if TYPE_CHECKING:
    from ngrpo_lora.training.run import Run

MakeConfig = Callable[..., RunConfig]

SMALL_RUN = [
    "model.dtype=float32",
    "prompts.train=world:train",
    "rollout.micro_batch_size=null",
    "trainer.micro_batch_size=16",
    "rollout.num_steps=4",  # the fewest of which DPM-Solver++ takes one to second order
    "rollout.group_size=4",
    "rollout.prompts_per_iteration=2",
    "algorithm.num_anchors=2",
    "algorithm.num_train_steps=2",
    "algorithm.updates_per_rollout=2",
    "algorithm.train_window=null",
    "algorithm.min_reward_spread=0",
    "algorithm.reference_weight=0",
    "algorithm.reuse_velocities=false",
    "algorithm.scale_rewards=group",
    "rollout.merge_adapter=false",
    "algorithm.distance=latent",
    "algorithm.perturbation_strength=0.5",
    "algorithm.clip_range=1e-3",
    "optimizer.schedule=constant",
    "optimizer.ema_decay=0",
    "optimizer.max_grad_norm=1.0",
    "lora.rank=4",
    "optimizer.learning_rate=1e-2",
    "trainer.num_iterations=2",
    "trainer.cpu_processes=1",
    "evaluation.num_prompts=2",
    "evaluation.every=2",
    "evaluation.micro_batch_size=1",
    "evaluation.rewards=[]",
    "evaluation.measures=[]",
]

# Any picture has a score, two pictures rarely the same one, and no verifier is needed.
REDNESS = """
import numpy as np

def score(images, prompts, metadata):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
"""


@pytest.fixture(autouse=True)
def _threads():
    """Two cores, as in CI, unless the environment says otherwise; results must not depend on it."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    """A test that draws from the global generator draws the same every time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """`make_config(output_dir, "key=value", ...)`: SMALL_RUN on the embedded model, rewarded for redness."""
    reward = tmp_path_factory.mktemp("rewards") / "redness.py"
    reward.write_text(REDNESS)

    def make(output_dir: Path, *overrides: str) -> RunConfig:
        settings = dict(text.split("=", 1) for text in SMALL_RUN)
        settings |= {"rewards": f"{reward}:score", "output_dir": str(output_dir)}
        settings |= dict(text.split("=", 1) for text in overrides)
        return load_config(None, [f"{key}={value}" for key, value in settings.items()])

    return make


def update_peak(config: RunConfig) -> int:
    """Most bytes that an update of two groups of four takes beside what is there all the time."""
    from ngrpo_lora.planning.meter import Meter
    from ngrpo_lora.training.rollouts import roll_out
    from ngrpo_lora.training.setup import prepare
    from ngrpo_lora.training.updates import update

    run = prepare(config)
    text = run.family.encode(["a red star"] * 2)
    rollouts = list(roll_out(run, text))
    advantages = torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 2, dtype=torch.float64)
    update(run, rollouts, advantages, text)  # the optimizer's state is there from now on
    with Meter() as meter:
        update(run, rollouts, advantages, text)
    return meter.peak


@dataclass(frozen=True)
class FinishedRun:
    """A run of four iterations, and what a bystander saw of it."""

    run: Run
    overrides: list[str]
    before: dict[str, dict[str, Tensor]]
    after_each_step: list[dict[str, Tensor]]
    rows_with_gradient: int
    rows_without_gradient: int

    @property
    def output_dir(self) -> Path:
        return self.run.output_dir


@pytest.fixture(scope="session")
def finished_run(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One run for all tests that only look: alpha is not the rank, the rate changes, weights are averaged."""
    from ngrpo_lora.training.setup import prepare
    from ngrpo_lora.training.trainer import complete

    overrides = [
        "trainer.num_iterations=4",
        "trainer.save_every=2",
        "lora.alpha=8",
        "optimizer.schedule=cosine",
        "optimizer.warmup_iterations=1",
        "optimizer.ema_decay=0.8",  # 0.5 would hide which way it goes
    ]
    run = prepare(make_config(tmp_path_factory.mktemp("finished"), *overrides))
    before = {
        part: {name: tensor.detach().clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
        for part, module in (("transformer", run.family.transformer), ("vae", run.family.vae))
    }
    rows = {True: 0, False: 0}

    def count(module: nn.Module, args: Any, output: Any) -> None:
        rows[torch.is_grad_enabled()] += len(output[0])

    run.family.transformer.register_forward_hook(count)
    after_each_step: list[dict[str, Tensor]] = []
    run.lora_step.optimizer.register_step_post_hook(
        lambda *_: after_each_step.append({name: p.detach().clone() for name, p in run.lora_step.parameters.items()})
    )
    complete(run)
    return FinishedRun(run, overrides, before, after_each_step, rows[True], rows[False])


@pytest.fixture(scope="session")
def adapter(finished_run: FinishedRun) -> Path:
    """The file of its averaged adapter, which no test changes."""
    return finished_run.output_dir / "adapter" / "pytorch_lora_weights.safetensors"
