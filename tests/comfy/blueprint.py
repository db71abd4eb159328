"""Graphs that become one node, as ComfyUI keeps them in a pack's folder subgraphs/."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from sheet import GAP, SLOT, STREET, TITLE, WIDGET, Node, Output, Sheet
from wires import Point

INPUTS, OUTPUTS = -10, -20  # ids of the two ends of a subgraph, which are no nodes
END = 120, 20  # width of an end, and how far its slots are from its sides


@dataclass
class Blueprint(Sheet):
    """A graph of which some inputs are left open and some outputs are given: those of the node that it becomes."""

    description: str = ""
    aliases: list[str] = field(default_factory=list)
    """Words by which it is found."""
    opened: list[tuple[str, Node, int]] = field(default_factory=list)
    """Name, and the first input that it stands for."""
    given: list[tuple[str, str]] = field(default_factory=list)
    """Name and type."""

    def open(self, name: str, *inputs: tuple[Node, str]) -> None:
        """Leave inputs of nodes open, all under one name; a widget's value is what the node has."""
        places = [[entry["name"] for entry in node.saved["inputs"]].index(key) for node, key in inputs]
        self.opened.append((name, inputs[0][0], places[0]))
        for (node, _), place in zip(inputs, places, strict=True):
            entry = node.saved["inputs"][place]
            entry["link"] = len(self.links) + 1
            self.links.append([entry["link"], INPUTS, len(self.opened) - 1, node.id, place, entry["type"]])

    def give(self, name: str, output: Output) -> None:
        """Make a node's output one of the whole."""
        saved = output.node.saved["outputs"][output.slot]
        saved["links"].append(len(self.links) + 1)
        self.given.append((name, saved["type"]))
        self.links.append(
            [len(self.links) + 1, output.node.id, output.slot, OUTPUTS, len(self.given) - 1, saved["type"]]
        )

    def end_box(self, end: int) -> list[int]:
        """Where the inputs or the outputs of the whole stand."""
        right = max(x + width for x, _, width, _ in (node.box for node in self.nodes))
        left = -END[0] - 2 * STREET if end == INPUTS else round(right) + 2 * STREET
        return [left, 0, END[0], 2 * END[1] + SLOT * len(self.opened if end == INPUTS else self.given)]

    def slot_at(self, end: int, slot: int) -> Point:
        """Where a wire leaves the inputs of the whole, or enters its outputs."""
        left, top, width, _ = self.end_box(end)
        return left + (width - END[1] if end == INPUTS else END[1]), top + END[1] + SLOT * slot

    def ends(self, link: list[Any]) -> tuple[Point, list[Point], tuple[str, str]]:
        _, source, slot, target, place, _ = link
        if source == INPUTS:
            node = self.nodes[target - 1]
            return self.slot_at(INPUTS, slot), node.inputs_at(place), ("inputs", node.name)
        if target == OUTPUTS:
            node = self.nodes[source - 1]
            return node.output_at(slot), [self.slot_at(OUTPUTS, place)], (node.name, "outputs")
        return super().ends(link)

    def _id(self, part: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"ngrpo-lora/subgraphs/{self.name}/{part}"))

    def definition(self) -> dict[str, Any]:
        """The graph within the node."""
        reroutes = self.reroutes()
        last = {entry["linkIds"][0]: {"parentId": entry["id"]} for entry in reroutes}
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        links = [dict(zip(names, link, strict=True)) | last.get(link[0], {}) for link in self.links]

        def slots(end: int, named: list[tuple[str, str]]) -> list[dict[str, Any]]:
            key = "origin" if end == INPUTS else "target"
            return [
                {"id": self._id(f"{end}/{name}"), "name": name, "type": kind, "pos": [*self.slot_at(end, slot)]}
                | {"linkIds": [one["id"] for one in links if (one[f"{key}_id"], one[f"{key}_slot"]) == (end, slot)]}
                for slot, (name, kind) in enumerate(named)
            ]

        opened = [(name, node.saved["inputs"][place]["type"]) for name, node, place in self.opened]
        state = {"lastNodeId": len(self.nodes), "lastLinkId": len(links), "lastGroupId": len(self.groups)}
        return {
            "id": self._id("graph"),
            "version": 1,
            "state": state | {"lastRerouteId": len(reroutes)},
            "revision": 0,
            "config": {},
            "name": self.name,
            "category": "Neighbor GRPO",
            "description": self.description,
            "inputNode": {"id": INPUTS, "bounding": self.end_box(INPUTS)},
            "outputNode": {"id": OUTPUTS, "bounding": self.end_box(OUTPUTS)},
            "inputs": slots(INPUTS, opened),
            "outputs": slots(OUTPUTS, self.given),
            "widgets": [],
            "nodes": [node.saved for node in self.nodes],
            "groups": self.groups,
            "links": links,
            "reroutes": reroutes,
            "extra": {},
        }

    def instance(self) -> dict[str, Any]:
        """The node."""
        entries = []
        for name, node, place in self.opened:
            entry = node.saved["inputs"][place]
            widget = {"widget": {"name": name}} if "widget" in entry else {}
            entries.append({"name": name, "type": entry["type"], "link": None} | widget)
        sockets = sum("widget" not in entry for entry in entries)
        height = SLOT * max(sockets, len(self.given)) + 2 * WIDGET * (len(entries) - sockets) + TITLE + GAP
        return {
            "id": 1,
            "type": self._id("graph"),
            "title": self.name,
            "pos": [0, 0],
            "size": [320, height],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": entries,
            "outputs": [{"name": name, "type": kind, "links": []} for name, kind in self.given],
            "properties": {},
            "widgets_values": [],
        }

    def ui(self) -> dict[str, Any]:
        """As the browser publishes it."""
        return {
            "id": self._id("file"),
            "revision": 0,
            "last_node_id": 1,
            "last_link_id": 0,
            "nodes": [self.instance()],
            "links": [],
            "groups": [],
            "definitions": {"subgraphs": [self.definition()]},
            "config": {},
            "extra": {"BlueprintDescription": self.description, "BlueprintSearchAliases": self.aliases},
            "version": 0.4,
        }
