"""Bytes of the optimizer's state against real ones, and of every reward's network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ngrpo_lora import registry
from ngrpo_lora.config import ModelRewardConfig, OptimizerConfig
from ngrpo_lora.planning.sizes import REWARD_PARAMETERS, optimizer_sizes
from ngrpo_lora.training.optimizers import make_optimizer


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion_8bit"])
def test_the_optimizer_state_is_counted_to_the_byte(name: Any):
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    sizes = [4095, 4096, 5000, 123_457]
    weights = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = make_optimizer(OptimizerConfig(name=name), weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    tensors = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    real = sum(value.nbytes for key, value in tensors if torch.is_tensor(value) and value.ndim and "qmap" not in key)
    assert optimizer_sizes(OptimizerConfig(name=name), sizes) == (real, 0)


def test_a_paged_optimizer_keeps_large_states_in_system_memory():
    whole, _ = optimizer_sizes(OptimizerConfig(name="adamw_8bit"), [4096, 100_000])
    on_gpu, paged = optimizer_sizes(OptimizerConfig(name="paged_adamw_8bit"), [4096, 100_000])
    assert (on_gpu + paged, paged) == (whole, 200_000)


@pytest.mark.parametrize("name", registry.names(registry.REWARDS))
def test_the_size_of_every_reward_network_is_known(name: str):
    kind = getattr(registry.load(registry.REWARDS, name), "Config", None)
    if kind is not None and issubclass(kind, ModelRewardConfig):
        path = kind.model_validate({"name": name}).path
        assert path in REWARD_PARAMETERS or not path  # vote has a network where it is given one
