"""ComfyUI's real interface in Chromium: open a template, press Run, look."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import requests
from comfy_client import Comfy
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from wires import Box, contains, curve, nodes_before, overlap

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEWER = Path(sys.prefix) / "frontend" / "comfyui_frontend_package" / "static"
"""A later release of the interface than the one that belongs to the engine."""

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # no welcome
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
FIT = """(zoom) => {
    const boxes = app.graph._groups.map((group) => group._bounding)
    const left = Math.min(...boxes.map((box) => box[0])), top = Math.min(...boxes.map((box) => box[1]))
    const right = Math.max(...boxes.map((box) => box[0] + box[2]))
    const bottom = Math.max(...boxes.map((box) => box[1] + box[3]))
    const view = app.canvas.ds, free = [innerWidth - 90, innerHeight - 150]
    view.scale = Math.min(zoom, free[0] / (right - left), free[1] / (bottom - top))
    view.offset[0] = 75 / view.scale - left
    view.offset[1] = 100 / view.scale - top
    app.canvas.setDirty(true, true)
    const corner = (x, y) => [(x + view.offset[0]) * view.scale, (y + view.offset[1]) * view.scale]
    return [...corner(left, top), ...corner(right, bottom)]
}"""


BOXES = """() => Object.fromEntries(app.graph._nodes.map((node) => {
    const name = `${node.id} ${node.type}`, drawn = document.querySelector(`[data-node-id="${node.id}"]`)
    if (!drawn) return [name, [...node.getBounding()]]
    const { scale, offset } = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect()
    const box = drawn.getBoundingClientRect()
    const place = [(box.x - canvas.x) / scale - offset[0], (box.y - canvas.y) / scale - offset[1]]
    return [name, [...place, box.width / scale, box.height / scale]]
}))"""
ALONE = """(kind) => {
    app.graph.clear()
    const node = LiteGraph.createNode(kind)
    app.graph.add(node)
    node.pos = [0, 0]
    node.setSize([Math.max(node.size[0], 360), node.size[1]])
    app.canvas.ds.scale = 1.25
    app.canvas.ds.offset = [80, 100]
    app.canvas.setDirty(true, true)
}"""
WIRES = """() => [...app.graph.links.values()].map((link) => {
    const source = app.graph.getNodeById(link.origin_id), target = app.graph.getNodeById(link.target_id)
    const points = [[...target.getInputPos(link.target_slot)]]
    for (let id = link.parentId; id !== undefined; id = app.graph.reroutes.get(id).parentId)
        points.unshift([...app.graph.reroutes.get(id).pos])
    points.unshift([...source.getOutputPos(link.origin_slot)])
    return { nodes: [`${source.id} ${source.type}`, `${target.id} ${target.type}`], points }
})"""
RESULTS = """(kind) => {
    const node = app.graph._nodes.find((node) => node.type === kind)
    const shown = node.widgets?.find((widget) => widget.name === 'result')?.element
    if (!shown?.isConnected || shown.offsetHeight < 20) return null
    return [...shown.children].flatMap((part) => part.tagName === 'TABLE'
        ? [...part.rows].map((row) => [...row.cells].map((cell) => cell.textContent))
        : part.textContent.split('\\n').map((line) => [line]))
}"""


class Interface:
    """A page of the browser."""

    def __init__(self, comfy: Comfy, page: Page, vue: bool):
        self.comfy, self.page, self.vue = comfy, page, vue

    def open_template(self, name: str) -> None:
        """From the template browser, as a user does."""
        self.page.locator(".templates-tab-button").click()
        self.page.get_by_role("dialog").get_by_text("ngrpo-lora", exact=True).first.click()
        card = self.page.get_by_test_id(f"template-workflow-{name}")
        before = self.page.evaluate_handle("() => app.graph._nodes[0]")
        card.click()
        card.wait_for(state="detached")
        self.page.wait_for_function("(before) => ![undefined, before].includes(app.graph._nodes[0])", arg=before)
        self.settle()

    def press_run(self) -> None:
        """Queue the graph, as a user does."""
        self.page.locator('button[data-testid="queue-button"], [data-testid="queue-button"] button').first.click()

    def run(self, timeout_s: float = 120) -> None:
        """Press Run, and wait until the run has ended, and the page shows what came of it."""
        before = self.comfy.get("/history").keys()
        self.press_run()
        end = time.monotonic() + timeout_s
        while self.comfy.get("/history").keys() == before:
            wrong = self.page.evaluate(
                "() => app.graph._nodes.filter((node) => node.has_errors).map(({ title }) => title)"
            )
            assert not wrong, f"{wrong}: {self.dialogs()}"
            assert time.monotonic() < end, "the run has not ended"
            self.page.wait_for_timeout(500)
        self.page.wait_for_timeout(1000)
        self.settle()

    def forget(self) -> None:
        """Let the server forget what it has computed, so that every node runs again."""
        requests.post(f"{self.comfy.url}/free", json={"free_memory": True}, timeout=60).raise_for_status()

    def settle(self) -> None:
        """Let the canvas draw."""
        self.page.evaluate("() => new Promise((done) => setTimeout(done, 800))")

    def prompt(self) -> dict[str, Any]:
        """The graph as Run sends it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def node(self, kind: str) -> dict[str, Any]:
        """What the first node of a class shows: title, labels of widgets, sizes of its pictures."""
        return self.page.evaluate(
            """(kind) => {
                const node = app.graph._nodes.find((node) => node.type === kind)
                const labels = node.widgets?.map((widget) => widget.label ?? widget.name) ?? []
                const sizes = (node.imgs ?? []).map((image) => [image.naturalWidth, image.naturalHeight])
                return { title: node.title, labels, sizes, bad: !!node.has_errors }
            }""",
            kind,
        )

    def set_widgets(self, kind: str, **values: Any) -> None:
        """Change widgets of the first node of a class."""
        self.page.evaluate(
            """([kind, values]) => {
                const node = app.graph._nodes.find((node) => node.type === kind)
                for (const [name, value] of Object.entries(values))
                    node.widgets.find((widget) => widget.name === name).value = value
            }""",
            [kind, values],
        )

    def boxes(self) -> dict[str, Box]:
        """Where every node is as it is drawn, in the graph's units, with its title bar; by number and class."""
        return self.page.evaluate(BOXES)

    def group_boxes(self) -> dict[str, Box]:
        """Where the groups are, by number and title."""
        return self.page.evaluate(
            "() => Object.fromEntries(app.graph._groups.map((one, i) => [`${i} ${one.title}`, [...one._bounding]]))"
        )

    def wires(self) -> list[dict[str, Any]]:
        """Every wire: the nodes that it connects, by number and class, and its ends with the reroutes between them."""
        return self.page.evaluate(WIRES)

    def check_layout(self) -> None:
        """Check that no node overlaps another or a wire, that each is in a group, and that groups are apart."""
        nodes, groups = self.boxes(), self.group_boxes()
        for boxes in (nodes, groups):
            overlaps = [pair for pair in combinations(boxes, 2) if overlap(boxes[pair[0]], boxes[pair[1]])]
            assert not overlaps, [(pair, [boxes[name] for name in pair]) for pair in overlaps]
        outside = {
            name: box for name, box in nodes.items() if not any(contains(group, box) for group in groups.values())
        }
        assert not outside, outside
        for wire in self.wires():
            before = nodes_before(curve(wire["points"]), tuple(wire["nodes"]), nodes)
            assert not before, f"{before} before the wire of {wire}"

    def results(self, kind: str) -> list[list[str]]:
        """Rows of cells of the tables, and other lines, that a node of a class shows as its result."""
        return self.page.wait_for_function(RESULTS, arg=kind).json_value()

    def dialogs(self) -> list[str]:
        """The texts of all open dialogs."""
        return self.page.locator(".p-dialog").all_inner_texts()

    def add_by_search(self, words: str) -> None:
        """Add the first node that the search finds to an empty graph; the words are in its name."""
        self.page.evaluate("() => app.graph.clear()")
        self.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        search = self.page.get_by_role("combobox", name="Add a node...")
        search.press_sequentially(words, delay=30)
        self.page.locator("#results-list [aria-selected=true]").get_by_text(words).wait_for()
        search.press("Enter")
        self.page.wait_for_function("() => app.graph._nodes.length === 1 && app.graph._nodes[0].flags.ghost")
        search.wait_for(state="detached")
        self.settle()  # what dims the page goes after it
        self.page.mouse.click(800, 600)  # puts down what hangs at the pointer
        self.page.wait_for_function("() => !app.graph._nodes[0].flags.ghost")

    def alone(self, kind: str) -> Image.Image:
        """A new node of a class, as Vue draws it, alone in the graph."""
        self.page.evaluate(ALONE, kind)
        self.settle()
        return Image.open(BytesIO(self.page.locator("[data-node-id]").screenshot())).convert("RGB")

    def screenshot(self, zoom: float = 1.0, only_graph: bool = False) -> Image.Image:
        """The page with the whole graph in view; or the graph alone."""
        left, top, right, bottom = self.page.evaluate(FIT, zoom)
        self.page.mouse.move(self.page.evaluate("innerWidth") / 2, self.page.evaluate("innerHeight") - 5)  # no tooltip
        self.settle()
        box = {"x": left, "y": top, "width": right - left, "height": bottom - top} if only_graph else None
        return Image.open(BytesIO(self.page.screenshot(clip=box))).convert("RGB")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(
    comfy: Comfy, browser: Browser, locale: str = "en", width: int = 1680, height: int = 1050, vue: bool = False
) -> Iterator[Interface]:
    """The interface of a running server, in a language; nodes drawn on the canvas, or by Vue ("Nodes 2.0")."""
    settings = SETTINGS | {"Comfy.Locale": locale, "Comfy.VueNodes.Enabled": vue}
    requests.post(f"{comfy.url}/settings", json=settings, timeout=60).raise_for_status()
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(180_000)  # of a busy machine
    page.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
    page.goto(comfy.url)
    page.wait_for_function("() => window.app?.graph && document.querySelector('.templates-tab-button')")
    page.wait_for_function("() => app.graph._nodes.length > 0")  # ComfyUI's own graph, which comes late
    interface = Interface(comfy, page, vue)
    interface.settle()
    yield interface
    page.close()
