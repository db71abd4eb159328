"""`--vary`: every combination is a checked configuration, and what is wrong is said once."""

from __future__ import annotations

import pytest

from ngrpo_lora.bench.varying import all_settings, read_values
from ngrpo_lora.config import load_config
from ngrpo_lora.errors import ConfigError


def test_every_combination_is_a_setting_with_its_own_label():
    settings = all_settings("demo", ["seed=3"], ["rollout.num_steps=4,8", "algorithm.distance=clean,latent"])
    assert [setting.label for setting in settings] == [
        "rollout.num_steps=4, algorithm.distance=clean",
        "rollout.num_steps=4, algorithm.distance=latent",
        "rollout.num_steps=8, algorithm.distance=clean",
        "rollout.num_steps=8, algorithm.distance=latent",
    ]
    assert settings[1].config == load_config("demo", ["seed=3", "rollout.num_steps=4", "algorithm.distance=latent"])


def test_without_vary_there_is_the_configuration_alone():
    (setting,) = all_settings("demo", [], [])
    assert (setting.label, setting.config) == ("as configured", load_config("demo"))


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("a.b=1e-4, 2", "a.b", [1e-4, 2]),
        ("algorithm=neighbor,flow_grpo", "algorithm", ["neighbor", "flow_grpo"]),
        ("x=null,true", "x", [None, True]),
        ("x={a: 1, b: 2},[3, 4]", "x", [{"a": 1, "b": 2}, [3, 4]]),
    ],
)
def test_values_are_yaml(text: str, key: str, values: list[object]):
    assert read_values(text) == (key, values)


def test_small_numbers_and_algorithms_reach_the_configuration():
    settings = all_settings(None, [], ["algorithm=neighbor,flow_grpo", "optimizer.learning_rate=1e-7,3e-4"])
    found = [(setting.config.algorithm.name, setting.config.optimizer.learning_rate) for setting in settings]
    assert found == [("neighbor", 1e-7), ("neighbor", 3e-4), ("flow_grpo", 1e-7), ("flow_grpo", 3e-4)]


def test_words_sections_in_short_and_every_character_reach_the_configuration():
    vary = ["rewards=world,jpeg", "model.vae_tiling=yes,no", "output_dir=010,😀", "hub.revision=2024"]
    found = [setting.config for setting in all_settings(None, [], vary)]
    assert [config.rewards.train[0].name for config in found] == ["world"] * 4 + ["jpeg"] * 4
    assert [config.model.vae_tiling for config in found] == [True, True, False, False] * 2
    assert [config.output_dir for config in found] == ["010", "😀"] * 4
    assert {config.hub.revision for config in found} == {"2024"}


@pytest.mark.parametrize(
    ("vary", "problems"),
    [
        (["rollout.nun_steps=4,8"], ["unknown key rollout.nun_steps; did you mean rollout.num_steps?"]),
        (["rollout.num_steps=4,1,0"], ["at least 2, got 1", "at least 2, got 0"]),
        (["rollout.num_steps"], ["must look like key=value,value, got 'rollout.num_steps'"]),
        (["rollout.num_steps="], ["must look like key=value,value"]),
        (["a b=1"], ["must look like key=value,value"]),
        (["x=[1"], ["x must be a YAML value"]),
        (["rollout.num_steps=4,8,4"], ["rollout.num_steps must have each value once, got 4 twice"]),
        (["seed=1", "seed=2"], ["must name each key once, got seed twice"]),
        (["rollout.group_size=4,8"], ["rollout.group_size is given twice"]),
    ],
)
def test_each_problem_is_said_once(vary: list[str], problems: list[str]):
    with pytest.raises(ConfigError) as error:
        all_settings("demo", ["rollout.group_size=12"], vary)
    assert len(error.value.problems) == len(problems)
    for found, part in zip(error.value.problems, problems, strict=True):
        assert part in found
