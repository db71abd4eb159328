"""The shipped graphs in the real interface, that of the engine and a later one, each with both ways of drawing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import requests
from browser import CHROMIUM, NEWER, Interface, chromium, opened
from comfy_client import REPOSITORY, Comfy, Graph, start
from playwright.sync_api import Browser, expect
from voters import until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

WORKFLOWS = REPOSITORY / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))

RESULTS = [
    ("sample-with-adapter", "NGRPO_LoadAdapter", ["file: ngrpo-demo.safetensors"]),
    ("best-of-n", "NGRPO_Score", ["rank", "image", "world"]),
    ("compare-adapters", "NGRPO_Compare", ["seed", "drawn with", "world", ""]),
    ("train-embedded", "NGRPO_Train", ["held-out", "before", "after", "change"]),
]
"""Graphs, a node of theirs with a result in words, and a line or row of it."""


SHORT = "evaluation.num_prompts=2\nevaluation.strict=null\nrollout.num_steps=4"
"""Seconds of training, of the preset that asks."""


HEIGHT = "() => app.graph._nodes.find((node) => node.type === 'NGRPO_Train').size[1]"
PAGE_PX = 400
"""By how much the voting page makes its node higher, at least."""

UNTOLD = """(address) => {
    const node = app.graph._nodes.find((node) => node.type === "NGRPO_Train").id
    const detail = { node: String(node), path: new URL(address).pathname, others: [] }
    app.api.dispatchEvent(new CustomEvent("ngrpo.vote", { detail }))
}"""
"""Show a page as where nobody has told of its end."""

GROW = """async ([kind, joining]) => {
    const wait = () => new Promise((done) => setTimeout(done, 500)), found = []
    const add = (kind) => app.graph.add(LiteGraph.createNode(kind)) && app.graph._nodes.at(-1)
    const join = () => app.graph._nodes.find((node) => node.type === joining)
    const note = async (node) => {
        await wait()
        const connected = node.inputs.filter((input) => input.link != null)
        const places = connected.map((input) => Number(input.name.split("_")[1]))
        found.push({ count: node.inputs.length, connected: places, height: node.size[1] })
    }
    app.graph.clear()
    add(joining)
    await note(join())
    for (let count = 1; count <= 5; count++) {
        add(kind).connect(0, join(), join().inputs.findIndex((input) => input.link == null))
        await note(join())
    }
    join().disconnectInput(4)
    join().disconnectInput(0)
    await note(join())
    await app.loadGraphData(structuredClone(app.graph.serialize()))
    await note(join())
    const copy = join().clone()
    app.graph.add(copy)
    await note(join())
    await note(copy)
    const name = joining === "NGRPO_JoinAdapters" ? "adapters" : "rewards"
    const inputs = { [`${name}_1`]: ["1", 0], [`${name}_7`]: ["1", 0] }
    await app.loadApiJson({ 1: { class_type: kind, inputs: {} }, 2: { class_type: joining, inputs } }, "read")
    await note(join())
    return found
}"""
"""Connect five nodes one after the other, disconnect two, save, open, copy, read an API format."""


def what_runs(graph: Graph) -> Graph:
    """Without titles, of which ComfyUI's own change, and without the text field that 1.32 sends as an input."""
    for node in graph.values():
        node.pop("_meta", None)
        if node["class_type"] == "PreviewAny":
            node["inputs"].pop("preview", None)
    return graph


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """The engine with a later interface."""
    server = start(tmp_path_factory.mktemp("newer"), "--front-end-root", str(NEWER))
    yield server
    server.stop()


@pytest.fixture(
    scope="module",
    params=[("comfy", False), ("comfy", True), ("newer", False), ("newer", True)],
    ids=["belonging", "belonging-vue", "newer", "newer-vue"],
)
def interface(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Interface]:
    server, vue = request.param
    with opened(request.getfixturevalue(server), browser, vue=vue) as page:
        yield page


@pytest.mark.parametrize("name", NAMES)
def test_a_template_opens_whole_and_is_the_graph_in_api_format(interface: Interface, name: str):
    interface.open_template(name)
    shown = interface.dialogs()
    if name == "sample-flux-with-adapter":  # offers to download what is not there
        assert all("flux1-dev.safetensors" in text for text in shown)
        interface.page.keyboard.press("Escape")
    else:
        assert not shown
    assert interface.page.locator(".comfy-missing-nodes").count() == 0
    shipped = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert what_runs(interface.prompt()) == what_runs(shipped)
    interface.check_layout()


@pytest.mark.parametrize(("name", "kind", "line"), RESULTS)
def test_a_run_leaves_its_results_on_the_nodes(
    comfy: Comfy, interface: Interface, name: str, kind: str, line: list[str]
):
    interface.open_template(name)
    if name == "train-embedded":
        short = {"iterations": 1, "overrides": "evaluation.num_prompts=4", "earlier_run": "start anew beside it"}
        interface.set_widgets("NGRPO_Train", **short)
    interface.forget()
    interface.run(600)
    assert not interface.dialogs()
    if not (interface.vue and interface.comfy is comfy):  # Vue's first version draws pictures as wide as their nodes
        interface.check_layout()
    shown = interface.results(kind)
    assert line in shown
    interface.page.evaluate("() => app.loadGraphData(app.graph.serialize())")  # as saved and opened again
    interface.settle()
    assert interface.results(kind) == shown


def test_votes_are_cast_in_the_node_and_the_page_goes_when_the_run_ends(comfy: Comfy, interface: Interface):
    interface.open_template("vote")
    short = {"iterations": 1, "overrides": SHORT, "earlier_run": "start anew beside it"}
    interface.set_widgets("NGRPO_Train", **short)
    interface.set_widgets("NGRPO_VoteReward", settings="undo_s=0")
    interface.forget()
    page = interface.page
    before = interface.comfy.get("/history").keys()
    interface.press_run()
    frame = page.frame_locator(".ngrpo-vote iframe")
    address = page.locator(".ngrpo-vote a").first.get_attribute("href")
    assert address is not None
    assert address.startswith(f"{interface.comfy.url}/ngrpo/vote/")
    expect(frame.locator(".picture")).to_have_count(6, timeout=300_000)
    until(lambda: requests.get(f"{address}state", timeout=60).json()["waiting"] == 2, "two groups do not wait")
    page.wait_for_timeout(1000)  # the frame has found its place
    interface.screenshot()  # with the whole node in view
    frame.locator('.picture[data-picture="4"]').click()
    frame.locator("#send").click()
    until(lambda: requests.get(f"{address}state", timeout=60).json()["votes"] == 1, "the click is no vote")
    other = requests.get(f"{address}state", timeout=60).json()["group"]["name"]
    vote = {"group": other, "said": "order", "orders": [[[0], [1]]]}
    requests.post(f"{address}ballot", json=vote, timeout=60).raise_for_status()
    expect(page.locator(".ngrpo-vote")).to_have_count(0, timeout=300_000)
    until(lambda: interface.comfy.get("/history").keys() != before, "the run has not ended")
    assert not interface.dialogs()
    assert ["held-out", "before", "after", "change"] in interface.results("NGRPO_Train")
    folder = max((interface.comfy.base / "output" / "ngrpo").glob("my-taste*"), key=lambda path: path.stat().st_mtime)
    clicked = json.loads((folder / "votes.jsonl").read_text().splitlines()[0])
    assert clicked["orders"] == [[[4], [0, 1, 2, 3, 5]]]


def test_a_page_that_is_opened_later_shows_the_frame_and_cancel_takes_it_away(newer: Comfy, browser: Browser):
    with opened(newer, browser) as interface:
        interface.open_template("vote")
        interface.set_widgets("NGRPO_Train", overrides=SHORT, earlier_run="start anew beside it")
        small = interface.page.evaluate(HEIGHT)
        interface.press_run()
        address = interface.page.locator(".ngrpo-vote a").first.get_attribute("href")
        large = interface.page.evaluate(HEIGHT)
        assert large >= small + PAGE_PX
        graph = interface.page.evaluate("() => app.graph.serialize()")  # as large as it is with the page
        with opened(newer, browser) as later:
            later.page.evaluate("(graph) => app.loadGraphData(graph)", graph)
            frame = later.page.locator(".ngrpo-vote iframe")
            expect(frame).to_have_count(1, timeout=60_000)
            newer.interrupt()
            for page in (interface.page, later.page):
                expect(page.locator(".ngrpo-vote")).to_have_count(0, timeout=60_000)
                assert page.evaluate(HEIGHT) <= large - PAGE_PX  # what the run says of itself has made it higher, too
            later.page.evaluate(UNTOLD, address)
            expect(frame).to_have_count(1)
            later.page.evaluate("() => app.api.dispatchEvent(new CustomEvent('reconnected'))")
            expect(frame).to_have_count(0, timeout=60_000)
            later.page.evaluate("(graph) => app.loadGraphData(graph)", graph)
            assert later.page.evaluate(HEIGHT) == small


@pytest.mark.parametrize(("kind", "joining"), [("AdapterList", "adapters"), ("Reward", "rewards")])
def test_inputs_grow_as_they_are_connected_and_a_saved_graph_has_those_it_had(
    comfy: Comfy, interface: Interface, kind: str, joining: str
):
    grown = interface.page.evaluate(GROW, [f"NGRPO_{kind}", f"NGRPO_Join{joining.title()}"])
    one_by_one: list[list[int]] = [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    without_two: list[list[int]] = [[2, 3, 4], [2, 3, 4], [2, 3, 4], []]  # then saved and opened, beside a copy
    shown = [(max([1, *places]) + 1, places) for places in (*one_by_one, *without_two, [1, 7])]
    assert [(one["count"], one["connected"]) for one in grown] == shown
    if not (interface.vue and interface.comfy is comfy):  # Vue's first version leaves nodes as high as they were once
        assert grown[-2]["height"] == grown[0]["height"] < grown[5]["height"]
    inputs = next(node["inputs"] for node in interface.prompt().values() if "Join" in node["class_type"])
    assert [*inputs] == [f"{joining}_1", f"{joining}_7"]
    if interface.vue:
        drawn = interface.page.locator("[data-node-id]", has_text=f"{joining}_8")
        expect(drawn.get_by_text(re.compile(rf"^{joining}_\d+$"))).to_have_count(8)


def test_run_draws_pictures(interface: Interface):
    interface.open_template("sample-with-adapter")
    interface.forget()
    interface.run()
    picture = interface.screenshot(only_graph=True)
    colors = picture.getcolors(maxcolors=picture.width * picture.height) or []
    reds = sum(count for count, (red, green, blue) in colors if red > 180 and green < 80 and blue < 80)
    assert reds > 500  # hearts and stars, which the empty graph has not


def test_the_interface_is_translated(newer: Comfy, browser: Browser):
    """1.32, which belongs to the engine, forgets what custom nodes translate (ComfyUI_frontend's issue 6748)."""
    texts = json.loads((REPOSITORY / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    with opened(newer, browser, "zh") as interface:
        interface.open_template("sample-with-adapter")
        shown = interface.node("NGRPO_LoadAdapter")
    expected = texts["NGRPO_LoadAdapter"]
    assert shown["title"] == expected["display_name"]
    assert expected["inputs"]["strength"]["name"] in shown["labels"]


def test_widgets_that_few_need_wait_for_a_click(newer: Comfy, browser: Browser):
    with opened(newer, browser, vue=True) as interface:
        interface.alone("NGRPO_LoadAdapter")
        node = interface.page.locator("[data-node-id]")
        assert "strength" in node.inner_text().splitlines()
        assert "alpha" not in node.inner_text().splitlines()
        node.get_by_text("Show advanced inputs").click()
        node.get_by_text("alpha", exact=True).wait_for()


def test_a_blueprint_is_found_and_becomes_a_node(newer: Comfy, browser: Browser):
    with opened(newer, browser) as interface:
        interface.add_by_search("adapter to picture")
        widgets = interface.page.evaluate(
            "() => Object.fromEntries(app.graph._nodes[0].widgets.map(({ name, value }) => [name, value]))"
        )
        prompt = interface.prompt()
    assert widgets["lora_name"] == "ngrpo-demo.safetensors"
    assert {"text", "strength", "batch_size", "noise_seed"} < widgets.keys()
    kinds = {node["class_type"] for node in prompt.values()}
    assert {"NGRPO_LoadAdapter", "SamplerCustomAdvanced", "VAEDecode"} < kinds


def test_a_graph_is_an_app_too(newer: Comfy, browser: Browser):
    with opened(newer, browser) as interface:
        interface.open_template("sample-with-adapter")
        interface.page.evaluate("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
        for label in ("text", "lora_name", "strength", "batch_size", "noise_seed"):
            interface.page.get_by_text(label, exact=True).locator("visible=true").first.wait_for()
        assert interface.page.get_by_text("schedule", exact=True).locator("visible=true").count() == 0
