"""Draw the graphs' thumbnails, the screenshots of the README and the help pages' pictures.

python tests/comfy/make_pictures.py [--folder FOLDER] [NAME...] runs every graph that can run here in ComfyUI's newer
interface, and draws the nodes; or those named alone, as vote or NGRPO_Train. ComfyUI's files are in FOLDER, where runs
that were cut off go on, or are forgotten. `make comfy-pictures` does it in the right environment.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from browser import NEWER, Interface, chromium, opened
from comfy_client import REPOSITORY, start
from PIL import Image, ImageOps
from sheets_sampling import MY_ADAPTER

WORKFLOWS = REPOSITORY / "workflows"
NODES = REPOSITORY / "comfy_nodes" / "web" / "docs" / "images"
IMAGES = REPOSITORY / ".github" / "images"
THUMBNAIL_PX = 512
GROUND = "#1b1b1b"
RESULTS = {
    "sample-with-adapter": "PreviewImage",
    "compare-adapters": "NGRPO_Compare",
    "compare-algorithms": "NGRPO_Compare",
    "strengths-by-step": "NGRPO_Compare",
    "best-of-n": "NGRPO_Score",
    "best-of-n-rewards": "NGRPO_Score",
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
    browser = interface.page.context.browser
    assert address is not None
    assert browser is not None
    tab = browser.new_page(viewport={"width": 640, "height": 640})
    tab.goto(address)
    tab.locator(".picture").last.wait_for(timeout=300_000)
    tab.wait_for_function("() => [...document.images].every((image) => image.complete && image.naturalWidth)")
    picture = Image.open(BytesIO(tab.screenshot())).convert("RGB")
    tab.close()
    interface.comfy.interrupt()
    return picture


def put_empty_files(models: Path) -> None:
    """Files of the names that graphs of large models load, lest the interface marks their nodes for lack of them."""
    for path in WORKFLOWS.glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            for file in node["properties"].get("models", []):
                (models / file["directory"]).mkdir(parents=True, exist_ok=True)
                (models / file["directory"] / file["name"]).touch()
    (models / "loras" / MY_ADAPTER).parent.mkdir(parents=True, exist_ok=True)
    (models / "loras" / MY_ADAPTER).touch()


def draw_nodes(interface: Interface, names: Sequence[str]) -> None:
    """The help pages' pictures: every node of ours alone, or those named."""
    NODES.mkdir(exist_ok=True)
    for kind in interface.comfy.get("/object_info"):
        if kind.startswith("NGRPO_") and (kind in names or not names):
            interface.alone(kind).save(NODES / f"{kind}.webp", quality=80)


def draw_graph(interface: Interface, path: Path) -> None:
    """A graph's thumbnail, and its screenshot where the README has one."""
    interface.open_template(path.stem)
    if path.stem in RESULTS:
        interface.run(3600)
        thumbnail = tiled(results(interface, RESULTS[path.stem]))
    elif path.stem == "vote":
        thumbnail = voting_page(interface).resize((THUMBNAIL_PX, THUMBNAIL_PX))
    else:
        size = (THUMBNAIL_PX, THUMBNAIL_PX)
        thumbnail = ImageOps.pad(interface.screenshot(only_graph=True), size, color=GROUND)
    thumbnail.save(path.with_suffix(".jpg"), quality=88)
    if path.stem in SHOWN:
        interface.screenshot().save(IMAGES / SHOWN[path.stem], optimize=True)


def draw(folder: Path, names: Sequence[str]) -> None:
    """Everything, or what is named, by a server whose files are in a folder."""
    put_empty_files(folder / "models")
    graphs = [path for path in sorted(WORKFLOWS.glob("*.json")) if path.stem in names or not names]
    server = start(folder, "--front-end-root", str(NEWER))
    try:
        with chromium() as browser:
            with opened(server, browser, vue=True) as interface:
                draw_nodes(interface, names)
            with opened(server, browser, width=1920, height=1080) as interface:
                for path in graphs:
                    draw_graph(interface, path)
    finally:
        server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as forgotten:
        draw(given.folder or Path(forgotten), given.names)
