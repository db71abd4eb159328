"""Graphs as the browser saves them, laid out in columns: what workflows/*.json are made with."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from wires import Box, Point, route

Schemas = dict[str, Any]
"""What /object_info says."""

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
TITLE, SLOT, WIDGET, TEXT = 30, 20, 28, 90  # heights, of the two ways in which the browser draws them the larger
BADGE, FRAME = 26, 16  # the line with the pack's name, for which one of them leaves room; and around all
GAP, MARGIN, HEADING = 24, 20, 50  # between nodes, around them in a group, and what a group's title needs
STREET = 64  # between nodes where wires pass
INSET = 10  # how far within a node its wires start and end
NOTE = {"color": "", "bgcolor": ""}  # as other nodes, in every palette; a note's own brown leaves its text pale
COLORS = {"model": "#3f789e", "text": "#4b7c4b", "sample": "#8d6c21", "result": "#6c6ca7", "train": "#a56031"}
"""Of groups; their titles, of the same colour, are as legible on the light canvas as on the dark one."""


@dataclass(frozen=True)
class Output:
    """A node's output, to be given to another node's input."""

    node: Node
    slot: int


@dataclass
class Node:
    """A node as it is saved."""

    id: int
    kind: str
    saved: dict[str, Any]
    names: list[str] = field(default_factory=list)
    room: int = 0
    """What is left free below it, in pixels."""

    def __getitem__(self, output: str | int) -> Output:
        return Output(self, output if isinstance(output, int) else self.names.index(output))

    @property
    def name(self) -> str:
        """Number and class, as the browser's tests name nodes."""
        return f"{self.id} {self.kind}"

    @property
    def box(self) -> Box:
        """Where it is when it has run, with its title."""
        (left, top), (width, height) = self.saved["pos"], self.saved["size"]
        return left, top - TITLE, width, height + TITLE + self.room

    def inputs_at(self, slot: int) -> list[Point]:
        """Where a wire enters it: at a widget either beside it, or at the node's top, as Vue's first version has it."""
        left, top = self.saved["pos"]
        inputs = self.saved["inputs"]
        if "widget" not in inputs[slot]:
            return [(left + INSET, top + SLOT * (slot + 0.7))]
        sockets = sum("widget" not in entry for entry in inputs)
        rows = max(sockets, len(self.names)) * SLOT + (slot - sockets + 0.5) * WIDGET
        return [(left + INSET, top + rows), (left + INSET, top)]

    def output_at(self, slot: int) -> Point:
        """Where a wire leaves it."""
        (left, top), (width, _) = self.saved["pos"], self.saved["size"]
        return left + width - INSET, top + SLOT * (slot + 0.7)


@dataclass
class Sheet:
    """A graph; its nodes stand in groups, its groups in columns from left to right."""

    name: str
    schemas: Schemas
    downloads: dict[str, str] = field(default_factory=dict)
    """Addresses of files, by their names."""
    nodes: list[Node] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    width: int = 0
    top: int = 0
    row: tuple[int, int] = 0, 0
    """Left and top of the row of nodes within a group."""
    far: tuple[int, int] = 0, 0
    """Right and bottom of a group's nodes so far."""
    app: dict[str, list[Any]] = field(default_factory=dict)
    """What the interface's app mode shows of the graph."""

    def column(self, width: int) -> None:
        """What follows stands right of all that there is."""
        self.left = max((x + w for x, _, w, _ in (group["bounding"] for group in self.groups)), default=0)
        self.left += GAP if self.groups else 0
        self.width, self.top = width, 0

    @contextmanager
    def group(self, title: str, color: str, street: int = 0) -> Iterator[None]:
        """The nodes added inside stand below each other, in a box with a title; `beside` and `below` change that.

        Args:
            street: what is left free above them for wires, in pixels.
        """
        left, top, width = self.left, self.top, self.width
        self.top += HEADING + street
        self.row, self.far = (left, self.top), (left + width, self.top)
        yield
        right, bottom = self.far
        box = [left, top, right + 2 * MARGIN - left, bottom - GAP + MARGIN - top]
        self.groups.append(
            {"id": len(self.groups) + 1, "title": title, "bounding": box, "color": COLORS[color], "font_size": 24}
            | {"flags": {}}
        )
        self.left, self.width, self.top = left, width, bottom - GAP + MARGIN + GAP

    def beside(self, width: int) -> None:
        """What follows stands right of the group's nodes in this row."""
        self.left += self.width + STREET
        self.width, self.top = width, self.row[1]
        self.far = max(self.far[0], self.left + width), self.far[1]

    def below(self, width: int = 0) -> None:
        """What follows stands below all of the group's nodes, and is as wide as these together unless said."""
        self.left = self.row[0]
        self.width, self.top = width or self.far[0] - self.left, self.far[1] - GAP + STREET
        self.row = self.left, self.top

    def space(self, height: int) -> None:
        """Leave free what wires need."""
        self.top += height

    def note(self, text: str, height: int) -> None:
        """What to do and what to expect, in Markdown."""
        self._place("MarkdownNote", height, [], [], [text], "Note", NOTE)

    def add(
        self, kind: str, title: str | None = None, body: int = 0, room: int = 0, files: str = "", **given: Any
    ) -> Node:
        """A node; what an input is not given has its default.

        Args:
            body: its height where it shows pictures or text, in pixels.
            room: what is left free below it, since it grows by its results when it has run.
            files: the folder of models/ whose files it loads, which need not be there.
        Raises:
            ValueError: an input that the node lacks, or a choice that it does not offer.
        """
        schema = self.schemas[kind]
        specs: dict[str, list[Any]] = {}
        for part in ("required", "optional"):
            for name in schema["input_order"].get(part, []):
                specs[name] = schema["input"][part][name]
        if unknown := given.keys() - specs.keys():
            raise ValueError(f"{kind} has no inputs {sorted(unknown)}, only {sorted(specs)}")
        sockets = {name: spec for name, spec in specs.items() if not is_widget(spec)}
        widgets = {name: spec for name, spec in specs.items() if is_widget(spec)}
        inputs = [{"name": name, "type": spec[0], "link": None} for name, spec in sockets.items()]
        inputs += [
            {"name": name, "type": type_of(spec), "widget": {"name": name}, "link": None}
            for name, spec in widgets.items()
        ]
        values = []
        for name, spec in widgets.items():
            value = given.get(name)
            values.append(default_of(spec) if value is None or isinstance(value, Output) else value)
            if not files and (choices := choices_of(spec)) is not None and values[-1] not in choices:
                raise ValueError(f"{kind}.{name} is one of {choices}, got {values[-1]!r}")
            if options_of(spec).get("control_after_generate"):
                values.append("fixed")
        outputs = [
            {"name": name, "type": kind_of, "links": []}
            for name, kind_of in zip(schema["output_name"], schema["output"], strict=True)
        ]
        texts = sum(bool(options_of(spec).get("multiline")) for spec in widgets.values())
        needed = (
            SLOT * max(len(sockets), len(outputs), 1) + WIDGET * (len(values) - texts) + TEXT * texts + FRAME + BADGE
        )
        node = self._place(kind, max(body, needed), inputs, outputs, values, title)
        node.room = room
        self.space(room)
        self.far = self.far[0], max(self.far[1], self.top)
        found = [{"name": v, "url": self.downloads[v], "directory": files} for v in values if v in self.downloads]
        node.saved["properties"] |= {"models": found} if found else {}
        for name, value in given.items():
            if isinstance(value, Output):
                self._link(value, node, name)
        return node

    def _place(
        self,
        kind: str,
        height: int,
        inputs: list[dict[str, Any]],
        outputs: list[dict[str, Any]],
        values: list[Any],
        title: str | None,
        colors: dict[str, str] | None = None,
    ) -> Node:
        saved: dict[str, Any] = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [self.left + MARGIN, self.top + TITLE],
            "size": [self.width, height],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            "properties": {} if kind == "MarkdownNote" else {"Node name for S&R": kind},
            "widgets_values": values,
        }
        named = {"title": title} if title else {}  # without one, the node's own in the reader's language
        node = Node(saved["id"], kind, saved | named | (colors or {}), [output["name"] for output in outputs])
        self.nodes.append(node)
        self.top += TITLE + height + GAP
        self.far = self.far[0], max(self.far[1], self.top)
        return node

    def _link(self, source: Output, target: Node, name: str) -> None:
        slot = [entry["name"] for entry in target.saved["inputs"]].index(name)
        output = source.node.saved["outputs"][source.slot]
        link = len(self.links) + 1
        self.links.append([link, source.node.id, source.slot, target.id, slot, output["type"]])
        output["links"].append(link)
        target.saved["inputs"][slot]["link"] = link

    def as_app(self, *outputs: Node, **inputs: Node) -> None:
        """In app mode show these nodes' results, and of each of the others the widget by whose name it is given."""
        self.app = {
            "inputs": [[node.id, name] for name, node in inputs.items()],
            "outputs": [node.id for node in outputs],
        }

    def ends(self, link: list[Any]) -> tuple[Point, list[Point], tuple[str, str]]:
        """Where a wire starts and where it may end, and the names of the nodes that it connects."""
        _, source, slot, target, place, _ = link
        start, end = self.nodes[source - 1], self.nodes[target - 1]
        return start.output_at(slot), end.inputs_at(place), (start.name, end.name)

    def reroutes(self) -> list[dict[str, Any]]:
        """Points by which wires go around nodes: each with its place, its wire, and the point before it."""
        boxes = {node.name: node.box for node in self.nodes}
        lanes: list[list[Point]] = []
        found: list[dict[str, Any]] = []
        for link in self.links:
            lanes.append(route(*self.ends(link), boxes, lanes))
            for number, point in enumerate(lanes[-1]):
                before = {"parentId": len(found)} if number else {}
                found.append({"id": len(found) + 1, **before, "pos": [*map(round, point)], "linkIds": [link[0]]})
        return found

    def ui(self) -> dict[str, Any]:
        """As the browser saves it."""
        extra: dict[str, Any] = {"ds": {"scale": 0.7, "offset": [120, 210]}}
        if self.app:
            extra["linearData"] = self.app
        if reroutes := self.reroutes():
            last = {entry["linkIds"][0]: entry["id"] for entry in reroutes}
            parents = [{"id": link, "parentId": reroute} for link, reroute in last.items()]
            extra |= {"reroutes": reroutes, "linkExtensions": parents}
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"ngrpo-lora/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": [node.saved for node in self.nodes],
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": extra,
            "version": 0.4,
        }


def type_of(spec: list[Any]) -> str:
    """An input's type; a list of choices is COMBO."""
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def options_of(spec: list[Any]) -> dict[str, Any]:
    """Default, range, tooltip and so on."""
    return spec[1] if len(spec) > 1 else {}


def is_widget(spec: list[Any]) -> bool:
    """Whether the browser shows a field for an input."""
    return type_of(spec) in WIDGETS and not options_of(spec).get("forceInput")


def choices_of(spec: list[Any]) -> list[Any] | None:
    """A COMBO's."""
    if type_of(spec) != "COMBO":
        return None
    return spec[0] if isinstance(spec[0], list) else options_of(spec)["options"]


def default_of(spec: list[Any]) -> Any:
    """The value that the browser begins with."""
    choices, options = choices_of(spec), options_of(spec)
    if "default" in options:
        return options["default"]
    if choices is not None:
        return choices[0] if choices else None
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[type_of(spec)]
