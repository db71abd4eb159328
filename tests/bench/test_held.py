"""An algorithm that is held trains every sample of a group, whatever the pictures are worth."""

from __future__ import annotations

import pytest
import torch

from ngrpo_lora.algorithms._opening import open_algorithm
from ngrpo_lora.bench.held import HeldAlgorithm
from ngrpo_lora.config import parse_config
from ngrpo_lora.types import RewardBatch


@pytest.mark.parametrize("group", [2, 3, 4, 12, 25])
def test_no_sample_of_a_group_is_without_an_advantage(group: int):
    config = parse_config({"algorithm": {"name": "dance"}, "rollout": {"group_size": group, "num_steps": 4}})
    held = HeldAlgorithm(open_algorithm(config))
    shape = (2, group)
    alike = RewardBatch(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.bool), {})
    advantages = held.advantages(alike)
    assert advantages.ne(0).all()
    trained = [(t.group, t.sample) for update in held.updates(advantages, 0, 0) for t in update]
    assert {*trained} == {(g, sample) for g in range(2) for sample in range(group)}
