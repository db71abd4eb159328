"""What later releases of ComfyUI ask a schema for, and this engine's does not have."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def schemas(in_process: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Schemas of all nodes, made with the fields that later releases have, by id."""
    from comfy_api.latest import io

    @dataclass
    class Schema(io.Schema):
        search_aliases: list[str] | None = None
        has_intermediate_output: bool = False

    nodes = all_nodes()
    monkeypatch.setattr(io, "Schema", Schema)
    made = [node.define_schema() for node in nodes]
    return {schema.node_id.removeprefix("NGRPO_"): schema for schema in made}


def all_nodes() -> list[Any]:
    import asyncio

    from comfy_nodes import comfy_entrypoint

    async def listed() -> list[Any]:
        return await (await comfy_entrypoint()).get_node_list()

    return asyncio.run(listed())


def test_this_engine_takes_the_schemas_too():
    from comfy_api.latest import io

    assert all(type(node.define_schema()) is io.Schema for node in all_nodes())


def test_every_node_has_words_by_which_it_is_found(schemas: dict[str, Any]):
    for name, schema in schemas.items():
        words = schema.search_aliases
        assert words, name
        assert words == [*dict.fromkeys(word.lower() for word in words)], name
        assert schema.display_name.lower() not in words, name


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("lora", {"LoadAdapter", "AdapterList", "JoinAdapters", "Compare", "Train"}),
        ("rl", {"Reward", "RewardFunction", "JoinRewards", "Train"}),
        ("dpm++", {"FlowSampler"}),
        ("best of n", {"Score"}),
        ("xy plot", {"AdapterList", "JoinAdapters", "Compare"}),
        ("diffusers", {"EncodePrompt", "LoadPipeline", "PipelineSample"}),
    ],
)
def test_what_a_word_finds(schemas: dict[str, Any], word: str, found: set[str]):
    assert {name for name, schema in schemas.items() if word in schema.search_aliases} == found


def test_results_in_the_middle_of_a_graph_are_sent_again(schemas: dict[str, Any]):
    """Of a node whose result is kept, later releases send what it shows only where its schema asks for it."""
    shows = {
        schema.node_id.removeprefix("NGRPO_")
        for node, schema in zip(all_nodes(), schemas.values(), strict=True)
        if "ui=" in inspect.getsource(node.execute) and not schema.is_output_node
    }
    assert shows == {name for name, schema in schemas.items() if schema.has_intermediate_output}
    assert shows == {"LoadAdapter", "LoadPromptEmbeddings"}
