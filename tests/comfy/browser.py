"""ComfyUI's real interface in Chromium: open a template, press Run, look."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import requests
from comfy_client import Comfy
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

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


class Interface:
    """A page of the browser."""

    def __init__(self, comfy: Comfy, page: Page):
        self.comfy, self.page = comfy, page

    def open_template(self, name: str) -> None:
        """From the template browser, as a user does."""
        self.page.locator(".templates-tab-button").click()
        self.page.get_by_text("ngrpo-lora", exact=True).first.click()
        card = self.page.get_by_test_id(f"template-workflow-{name}")
        card.click()
        card.wait_for(state="detached")
        self.page.wait_for_function("() => app.graph._nodes.length > 3")
        self.settle()

    def run(self, timeout_s: float = 120) -> None:
        """Press Run, and wait until the queue is empty and pictures are shown."""
        self.page.locator('button[data-testid="queue-button"], [data-testid="queue-button"] button').first.click()
        self.page.wait_for_function(
            "() => app.graph._nodes.some((node) => node.imgs?.length || node.has_errors)", timeout=timeout_s * 1000
        )
        wrong = self.page.evaluate("() => app.graph._nodes.filter((node) => node.has_errors).map((node) => node.title)")
        assert not wrong, f"{wrong}: {self.dialogs()}"
        end = time.monotonic() + timeout_s
        while any(self.comfy.get("/queue").values()):
            assert time.monotonic() < end, "the queue is not empty"
            self.page.wait_for_timeout(500)
        self.settle()

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

    def dialogs(self) -> list[str]:
        """The texts of all open dialogs."""
        return self.page.locator(".p-dialog").all_inner_texts()

    def screenshot(self, zoom: float = 1.0, only_graph: bool = False) -> Image.Image:
        """The page with the whole graph in view; or the graph alone."""
        left, top, right, bottom = self.page.evaluate(FIT, zoom)
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
    comfy: Comfy, browser: Browser, locale: str = "en", width: int = 1680, height: int = 1050
) -> Iterator[Interface]:
    """The interface of a running server, in a language."""
    settings = SETTINGS | {"Comfy.Locale": locale}
    requests.post(f"{comfy.url}/settings", json=settings, timeout=60).raise_for_status()
    page = browser.new_page(viewport={"width": width, "height": height})
    page.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
    page.goto(comfy.url)
    page.wait_for_function("() => window.app?.graph && document.querySelector('.templates-tab-button')")
    interface = Interface(comfy, page)
    interface.settle()
    yield interface
    page.close()
