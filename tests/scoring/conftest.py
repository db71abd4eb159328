"""A reward around a function of the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.scoring import scorer
from ngrpo_lora.scoring.scorer import BoundReward


@pytest.fixture
def make_reward(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BoundReward]:
    """A reward around a function of the test."""

    def make(function: Callable[..., Any], **settings: Any) -> BoundReward:
        monkeypatch.setattr(scorer, "load_reward", lambda config, device: function)
        return BoundReward(RewardConfig(name="mine.py:score", **settings), "cpu")

    return make
