"""Inputs that grow: nodes that join any number of adapters or rewards to the value that a chain of them gives.

ComfyUI 0.3.75 has no inputs that grow by themselves. So all of them are declared, each may be left free, and
`web/join.js` shows those that are in use and one more. A graph is the same with and without it, in any release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ngrpo_lora.config import RewardConfig, parse_reward_entries
from ngrpo_lora.errors import ConfigError

from ._api import Node, check_given, schema
from .comparing import Adapters, Choice, Column
from .rewards import Chosen, Entries, Rewards

MOST = 16
"""How many inputs a node has; one whose input is another's output has as many more."""


def names(what: str) -> list[str]:
    """Names of the inputs of a node that joins."""
    return [f"{what}_{number}" for number in range(1, MOST + 1)]


def growing(kind: Any, what: str, source: str) -> list[io.Input]:
    """Make the inputs of a node that joins; source is the node whose output they take."""
    tooltip = f"Of {source}, or a chain of them. A further input appears when this one is connected."
    return [kind.Input(name, optional=True, tooltip=tooltip) for name in names(what)]


def connected(what: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the inputs that are connected into the order of their numbers; there may be free ones between them.

    Raises:
        ConfigError: none is connected, or one that the node does not have.
    """
    known = names(what)
    if others := sorted(given.keys() - {*known}):
        raise ConfigError(
            f"inputs must be {known[0]} to {known[-1]}, got {', '.join(others)}; join what is left in a further node, "
            "and connect that to this one"
        )
    if not given:
        raise ConfigError(f"one of {known[0]} to {known[-1]} must be connected, got none")
    return {name: given[name] for name in known if name in given}


def each_once(lists: Mapping[str, Choice]) -> Choice:
    """Put lists of adapters by their inputs one behind the other.

    Raises:
        ConfigError: two columns are the same.
    """
    places: dict[Column, list[str]] = {}
    for place, columns in lists.items():
        for column in columns:
            places.setdefault(column, []).append(place)
    twice = {column.caption(column.file): found for column, found in places.items() if len(found) > 1}
    if twice:
        said = "; ".join(f"{caption} from {' and '.join(found)}" for caption, found in twice.items())
        raise ConfigError(f"adapters must be listed once at each strength and schedule, got {said}; leave one out")
    return tuple(places)


class JoinAdapters(Node):
    """Node that joins lists of adapters."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "JoinAdapters",
            display_name="Join Adapters",
            description="Puts any number of Adapter List nodes side by side for Compare, in the order of the inputs: "
            "what a chain of them gives. An input appears whenever the last one is connected.",
            search_aliases=["lora", "lora stack", "merge lists", "combine", "xy plot"],
            inputs=growing(Adapters, "adapters", "Adapter List"),
            outputs=[Adapters.Output(display_name="adapters")],
        )

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool:
        return bool(connected("adapters", given))

    @classmethod
    def execute(cls, **given: Choice) -> io.NodeOutput:
        lists = connected("adapters", given)
        for name, value in lists.items():
            check_given(name, value, Column, "Adapter List")
        return io.NodeOutput(each_once(lists))


class JoinRewards(Node):
    """Node that joins rewards."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "JoinRewards",
            display_name="Join Rewards",
            description="Adds up any number of reward nodes, each with its weight, for Score, Compare and Train: what "
            "a chain of them gives. An input appears whenever the last one is connected.",
            search_aliases=["combine", "preference", "rl", "several rewards", "weighted sum"],
            inputs=growing(Rewards, "rewards", "Reward"),
            outputs=[Rewards.Output(display_name="rewards")],
        )

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool:
        return bool(connected("rewards", given))

    @classmethod
    def execute(cls, **given: Entries) -> io.NodeOutput:
        lists = connected("rewards", given)
        for name, value in lists.items():
            check_given(name, value, RewardConfig, "a reward node")
        return io.NodeOutput(Chosen(parse_reward_entries([one for value in lists.values() for one in value])))


NODES: list[type[io.ComfyNode]] = [JoinAdapters, JoinRewards]
