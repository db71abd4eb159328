"""Where a reward's network runs, in which number type, and where it waits between uses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ngrpo_lora.config import ModelRewardConfig
from ngrpo_lora.rewards._placement import in_use, placement


@pytest.mark.parametrize(
    ("settings", "device", "half", "expected"),
    [
        ({}, "cpu", "float16", ("cpu", torch.float32)),
        ({}, "mps", "float16", ("mps", torch.float16)),
        ({}, "mps", "bfloat16", ("mps", torch.bfloat16)),
        ({"device": "cpu"}, "mps", "float16", ("cpu", torch.float32)),
        ({"dtype": "bfloat16"}, "cpu", "float16", ("cpu", torch.bfloat16)),
        ({"dtype": "float32"}, "mps", "float16", ("mps", torch.float32)),
    ],
)
def test_a_reward_is_where_it_says_else_where_the_model_is(
    settings: dict[str, str], device: str, half: str, expected: tuple[str, torch.dtype]
):
    config = ModelRewardConfig.model_validate({"name": "pickscore"} | settings)
    assert placement(config, device, half) == expected


@pytest.mark.parametrize("offload", [False, True])
def test_a_network_rests_in_system_memory_where_it_is_asked_to_whatever_its_use_ends_with(offload: bool):
    network = nn.Linear(2, 3).requires_grad_(False)
    weight = network.weight

    def use() -> None:
        with in_use(network, "meta", offload) as used:
            assert used is network
            assert network.weight.device.type == "meta"
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            use()
        assert (network.weight is weight) == offload
