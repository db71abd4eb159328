"""Nodes whose inputs grow: what they join is what a chain gives, to the last bit, and what cannot be joined is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comfy_client import Comfy, Graph, Refused, Result
from graphs import PROMPT, drawing, node

DEMO = "ngrpo-demo.safetensors"
STRENGTHS = ["0.25", "0.5, 1", "-0.5", "1.5", "0.75"]
REWARDS = [("jpeg", 1.0), ("world", 0.5), ("jpeg", -2.0), ("world_strict", 3.0), ("jpeg", 0.25)]


def listed(number: int, **chain: Any) -> dict[str, Any]:
    return node("NGRPO_AdapterList", lora_name=DEMO, strengths=STRENGTHS[number], **chain)


def reward(number: int, **chain: Any) -> dict[str, Any]:
    name, weight = REWARDS[number]
    return node("NGRPO_Reward", name=name, weight=weight, settings=f"label=r{number}", **chain)


def chained(count: int, what: str, make: Any) -> Graph:
    """Nodes of which each takes the one before it, the last one named `joined`."""
    names = [*(f"{what}{number}" for number in range(count - 1)), "joined"]
    chains = [{}, *({what: [name, 0]} for name in names)]
    return {name: make(number, **chains[number]) for number, name in enumerate(names)}


def joined(count: int, what: str, make: Any, places: Any = None) -> Graph:
    """The same nodes side by side; places are the numbers of the inputs, which a graph may have in any order."""
    inputs = {f"{what}_{place}": [f"{what}{number}", 0] for number, place in enumerate(places or range(1, count + 1))}
    nodes = {f"{what}{number}": make(number) for number in range(count)}
    return nodes | {"joined": node(f"NGRPO_Join{what.title()}", **dict(reversed(inputs.items())))}


def comparison(adapters: Graph) -> Graph:
    graph = {
        name: one for name, one in drawing(steps=2).items() if name in ("model", "text", "sampler", "sigmas", "latent")
    }
    links = {"model": ["model", 0], "positive": ["text", 0], "vae": ["model", 2], "sampler": ["sampler", 0]}
    links |= {"sigmas": ["sigmas", 0], "latent_image": ["latent", 0], "adapters": ["joined", 0]}
    widgets = {"noise_seed": 7, "num_seeds": 1, "base_too": True, "cfg": 1.0, "prompt": PROMPT, "cell_px": 128}
    return graph | adapters | {"show": node("NGRPO_Compare", **links, **widgets)}


def scores(rewards: Graph) -> Graph:
    graph = {name: one for name, one in drawing(steps=2, batch=3).items() if name not in ("save", "show")}
    widgets = {"prompt": PROMPT, "n": 1, "combine": "standardized", "metadata": "", "sheet_px": 128}
    return graph | rewards | {"show": node("NGRPO_Score", images=["decode", 0], rewards=["joined", 0], **widgets)}


def shown(comfy: Comfy, graph: Graph) -> tuple[str, np.ndarray]:
    """The table and the pixels of its picture."""
    result = comfy.run(graph)
    assert result.status == "success", result.error
    (picture,) = result.outputs["show"]["images"]
    return result.outputs["show"]["text"][0], np.asarray(comfy.image(picture))


KINDS = pytest.mark.parametrize(
    ("what", "make", "use"),
    [("adapters", listed, comparison), ("rewards", reward, scores)],
    ids=["adapters", "rewards"],
)


@KINDS
@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_is_joined_is_what_a_chain_gives(comfy: Comfy, what: str, make: Any, use: Any, count: int):
    table, pixels = shown(comfy, use(chained(count, what, make)))
    for places in (None, [3, *range(10, 10 + count - 1)]):
        again, same = shown(comfy, use(joined(count, what, make, places)))
        assert again == table
        assert np.array_equal(same, pixels)


@KINDS
def test_what_is_joined_may_be_chains_and_joined_before(comfy: Comfy, what: str, make: Any, use: Any):
    table, pixels = shown(comfy, use(chained(5, what, make)))
    graph = joined(2, what, make)
    graph["first"] = graph.pop("joined")
    graph["third"] = make(2)
    graph["fourth"] = make(3, **{what: ["third", 0]})
    graph["second"] = node(f"NGRPO_Join{what.title()}", **{f"{what}_1": ["first", 0], f"{what}_2": ["fourth", 0]})
    graph["joined"] = make(4, **{what: ["second", 0]})
    again, same = shown(comfy, use(graph))
    assert again == table
    assert np.array_equal(same, pixels)


@KINDS
def test_inputs_that_are_not_the_nodes_are_refused_before_anything_runs(comfy: Comfy, what: str, make: Any, use: Any):
    for places, reason in (
        (range(1, 1), f"one of {what}_1 to {what}_16 must be connected, got none"),
        ([1, 17], f"inputs must be {what}_1 to {what}_16, got {what}_17; join what is left in a further node"),
        ([0], f"inputs must be {what}_1 to {what}_16, got {what}_0"),
    ):
        graph = joined(len(places), what, make)
        graph["joined"]["inputs"] = {f"{what}_{place}": [f"{what}{n}", 0] for n, place in enumerate(places)}
        with pytest.raises(Refused) as refused:
            comfy.submit(use(graph))
        assert refused.value.reasons.count(reason) == 1, refused.value.reasons


def failed(comfy: Comfy, graph: Graph, at: str) -> str:
    result: Result = comfy.run(graph)
    assert (result.status, result.error_node) == ("error", at)
    return result.error


def test_the_same_twice_is_said_with_its_places(comfy: Comfy):
    graph = joined(3, "adapters", listed)
    graph["adapters2"] = node("NGRPO_AdapterList", lora_name=DEMO, strengths="2, 0.5")
    error = failed(comfy, comparison(graph), "joined")
    assert error.count(f"got {DEMO} x 0.5 from adapters_2 and adapters_3; leave one out") == 1
    graph = joined(2, "rewards", reward)
    graph["rewards0"] = graph["rewards1"] = node("NGRPO_Reward", name="jpeg", weight=1.0, settings="")
    error = failed(comfy, scores(graph), "joined")
    assert "must name each reward once, got jpeg twice; give one of them a label" in error


def test_only_one_vote_reward_may_ask(comfy: Comfy):
    graph = joined(2, "rewards", reward)
    vote = {"votes": "", "who_votes": "you", "wait_minutes": 0.0, "phone": False, "port": 0, "weight": 1.0}
    graph |= {f"rewards{n}": node("NGRPO_VoteReward", **vote, settings=f"label=v{n}") for n in range(2)}
    assert "must ask people for one reward" in failed(comfy, scores(graph), "joined")


@pytest.mark.parametrize(
    ("kind", "name", "source"),
    [
        ("NGRPO_JoinAdapters", "adapters_1", "Adapter List"),
        ("NGRPO_JoinRewards", "rewards_1", "a reward node"),
        ("NGRPO_AdapterList", "adapters", "Adapter List"),
        ("NGRPO_Reward", "rewards", "a reward node"),
    ],
)
def test_an_output_of_any_type_is_not_taken_for_what_it_is_not(comfy: Comfy, kind: str, name: str, source: str):
    """Train's lora_name is one, which fits every input; here its place has what it would give."""
    widgets = {"NGRPO_AdapterList": {"lora_name": DEMO, "strengths": "1"}}
    widgets |= {"NGRPO_Reward": {"name": "jpeg", "weight": 1.0, "settings": ""}}
    graph = {"joined": node(kind, **{name: "a name"}, **widgets.get(kind, {}))}
    use = comparison if "adapters" in name else scores
    assert f"{name} must come from {source}, got 'a name'" in failed(comfy, use(graph), "joined")
