"""Sections whose keys depend on a name: the algorithm's and each reward's."""

from __future__ import annotations

import pytest

from ngrpo_lora.config import (
    RewardConfig,
    RunConfig,
    describe,
    load_config,
)
from ngrpo_lora.errors import ConfigError


def test_an_algorithm_brings_its_own_keys():
    config = load_config(None, ["algorithm=neighbor", "algorithm.num_anchors=2"])
    assert config.algorithm.name == "neighbor"
    assert config.algorithm.model_dump()["num_anchors"] == 2
    assert "algorithm.num_anchors" in {option.key for option in describe()}


def test_reward_shorthands_mean_the_same():
    forms = ["rewards=world", "rewards=[world]", "rewards=[{name: world}]", "rewards={name: world, weight: 1}"]
    assert len({load_config(None, [form]).rewards for form in forms}) == 1
    assert load_config(None, ["rewards.train=world", "rewards.combine=raw"]).rewards.train == RunConfig().rewards.train
    two = load_config(None, ["rewards=[world, {name: my_reward.py:score, weight: -0.5}]"]).rewards.train
    assert [(reward.name, reward.weight) for reward in two] == [("world", 1.0), ("my_reward.py:score", -0.5)]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"name": "world"}, "world"),
        ({"name": "folder/mine.py:score"}, "mine"),
        ({"name": "folder/mine.py:brightness"}, "brightness"),
        ({"name": "my.package:score"}, "package"),
        ({"name": "mine.py:score", "label": "better"}, "better"),
    ],
)
def test_a_reward_is_called_by_a_short_name(settings: dict[str, str], key: str):
    assert RewardConfig(**settings).key == key


@pytest.mark.parametrize("key", ["rewards", "evaluation.rewards", "evaluation.strict"])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [("my_package.my_reward", "; give my_package.my_reward:score, or what its function is called"), ("a.py:b-c", "")],
)
def test_a_reward_elsewhere_is_named_with_its_function(key: str, name: str, remedy: str):
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"{key}={name}"])
    (problem,) = error.value.problems
    rule = "must be a reward's name, package.module:function or file.py:function, got"
    assert problem.endswith(f"{rule} {name!r}{remedy}")
