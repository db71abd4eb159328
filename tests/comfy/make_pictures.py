"""Draw the graphs' thumbnails, and the screenshots of the README: python tests/comfy/make_pictures.py [GRAPH...]

Runs every graph that can run here, or those named, in ComfyUI's interface; `make comfy-pictures` does it in the right
environment.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from browser import Interface, chromium, opened
from comfy_client import REPOSITORY, start
from PIL import Image, ImageOps

WORKFLOWS = REPOSITORY / "workflows"
IMAGES = REPOSITORY / ".github" / "images"
THUMBNAIL_PX = 512
GROUND = "#1b1b1b"
RESULTS = {
    "sample-with-adapter": "PreviewImage",
    "compare-adapters": "NGRPO_Compare",
    "best-of-n": "NGRPO_Score",
    "neighbor-explorer": "PreviewImage",
    "train-embedded": "PreviewImage",
}
"""Graphs that run anywhere, and the node whose pictures stand for them."""

SHOWN = {"train-embedded": "comfyui-train.png", "compare-adapters": "comfyui-compare.png"}


def tiled(pictures: Sequence[Image.Image]) -> Image.Image:
    """In a square."""
    columns = math.ceil(math.sqrt(len(pictures)))
    cell = THUMBNAIL_PX // columns
    square = Image.new("RGB", (THUMBNAIL_PX, THUMBNAIL_PX), GROUND)
    height = cell * math.ceil(len(pictures) / columns)
    for number, picture in enumerate(pictures):
        place = (number % columns * cell, (THUMBNAIL_PX - height) // 2 + number // columns * cell)
        square.paste(ImageOps.pad(picture, (cell, cell), color=GROUND), place)
    return square


def results(interface: Interface, kind: str) -> list[Image.Image]:
    """The pictures that the first node of a class shows."""
    node = interface.page.evaluate("(kind) => app.graph._nodes.find((node) => node.type === kind).id", kind)
    (latest,) = interface.comfy.get("/history?max_items=1").values()
    return [interface.comfy.image(one).convert("RGB") for one in latest["outputs"][str(node)]["images"]]


def voting_page(interface: Interface) -> Image.Image:
    """The page of a graph that asks, with the first pictures."""
    interface.press_run()
    address = interface.page.locator(".ngrpo-vote a").first.get_attribute("href")
    assert address is not None
    tab = interface.page.context.new_page()
    tab.set_viewport_size({"width": 640, "height": 640})
    tab.goto(address)
    tab.locator(".picture").last.wait_for(timeout=300_000)
    tab.wait_for_timeout(1000)
    picture = Image.open(BytesIO(tab.screenshot())).convert("RGB")
    tab.close()
    interface.comfy.interrupt()
    return picture


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        server = start(Path(base))
        try:
            with chromium() as browser, opened(server, browser) as page:
                for path in sorted(WORKFLOWS.glob("*.json")):
                    if sys.argv[1:] and path.stem not in sys.argv[1:]:
                        continue
                    page.open_template(path.stem)
                    page.page.keyboard.press("Escape")  # the offer to download what is missing
                    if path.stem in RESULTS:
                        page.run(3600)
                        thumbnail = tiled(results(page, RESULTS[path.stem]))
                    elif path.stem == "vote":
                        thumbnail = voting_page(page).resize((THUMBNAIL_PX, THUMBNAIL_PX))
                    else:
                        size = (THUMBNAIL_PX, THUMBNAIL_PX)
                        thumbnail = ImageOps.pad(page.screenshot(only_graph=True), size, color=GROUND)
                    thumbnail.save(path.with_suffix(".jpg"), quality=88)
                    if path.stem in SHOWN:
                        page.screenshot().save(IMAGES / SHOWN[path.stem], optimize=True)
        finally:
            server.stop()
