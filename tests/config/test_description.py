"""Every key has a type, a default and a meaning."""

from __future__ import annotations

import pytest
import yaml

from ngrpo_lora.config import (
    RunConfig,
    describe,
    describe_reward,
    dump_config,
    parse_config,
)


def test_the_dump_is_complete():
    flat = {option.key for option in describe() if not option.is_section}
    values = yaml.safe_load(dump_config(RunConfig()))

    def keys(node: dict, prefix: str = "") -> set[str]:
        inner = {f"{prefix}{k}": v for k, v in node.items()}
        return set().union(
            *({k} if k in flat or not isinstance(v, dict) else keys(v, f"{k}.") for k, v in inner.items())
        )

    assert keys(values) == flat


def test_every_key_has_a_description_and_its_default_is_valid():
    for option in describe():
        assert option.description.endswith("."), option.key
    assert parse_config(yaml.safe_load(dump_config(RunConfig()))) == RunConfig()


@pytest.mark.parametrize(
    ("key", "accepts"),
    [
        ("seed", "int >= 0"),
        ("rollout.solver", "dpmpp_2m | euler"),
        ("rollout.num_steps", "int >= 2, <= 1000"),
        ("rollout.shift", "number > 0 | null"),
        ("rollout.merge_adapter", "true | false"),
        ("rollout.micro_batch_size", "int >= 1 | null"),
        ("optimizer.betas", "[number >= 0, < 1, number >= 0, < 1]"),
        ("prompts.train", "text | {text: int >= 1}"),
        ("rewards.train", "[{name, weight, ...}, ...]"),
    ],
)
def test_what_a_key_accepts_is_said_for_people(key: str, accepts: str):
    assert next(option.type for option in describe() if option.key == key) == accepts


def test_an_algorithm_and_a_reward_are_described_with_their_own_settings():
    assert "algorithm.step" in {option.key for option in describe({"algorithm": {"name": "flow_grpo"}})}
    assert "algorithm.step" not in {option.key for option in describe({"algorithm": "gone"})}
    options = {option.key: option for option in describe_reward("geneval")}
    assert (options["name"].default, options["graded"].type, options["graded"].default) == (
        "required",
        "true | false",
        False,
    )
