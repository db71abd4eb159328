"""The page: one file that loads nothing, and safe with any prompt. tests/comfy/test_report.py opens it in a browser."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import HOSTILE

from ngrpo_lora.evaluation.report.page import in_short, write_report
from ngrpo_lora.evaluation.report.record import Record


class Page(HTMLParser):
    """Elements with their attributes, and all text that is shown."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(params=[1, 2], ids=["one run", "two runs"])
def records(request: pytest.FixtureRequest, write_run) -> list[Record]:
    return [write_run(f"<b>{number}") for number in range(request.param)]


def test_the_page_loads_nothing_and_shows_every_text_as_it_is(records: list[Record], tmp_path: Path):
    page = Page(write_report(records, tmp_path / "new" / "report.html"))
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "object", "form", "base"})
    assert [tag for tag, _ in page.elements].count("script") == 1  # the page's own
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert str(policy).startswith("default-src 'none'; img-src data:;")
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href") or str(value).startswith("data:image/webp;base64,")
    assert HOSTILE in page.text
    assert "<b>0" in page.text
    assert "$" not in page.text.replace(HOSTILE, "").replace("$title", "")


def test_prompts_have_their_own_direction(records: list[Record], tmp_path: Path):
    text = write_report(records, tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("אדום") == text.count("🎨") > 2
    assert 'dir="auto">&lt;/script&gt;&lt;script&gt;' in text


def test_a_run_in_its_first_iterations_has_a_page(write_run, tmp_path: Path):
    record = write_run()
    young = replace(record, rows=record.rows[:1], is_running=True)
    for path in (record.folder / "evaluations").glob("*10.jsonl"):
        path.unlink()
    page = Page(write_report([young], tmp_path / "report.html"))
    assert "running, iteration 0 of 10 · 3 s so far" in page.text
    assert "The base model." in page.text
    assert not [tag for tag, _ in page.elements if tag == "input"]


def test_a_run_in_short(write_run):
    assert in_short(write_run()) == "finished, 10 iterations · 41 s · world 0.250 → 0.750"


def test_what_failed_is_left_out(write_run, tmp_path: Path):
    record = write_run()
    for path in (record.folder / "evaluations").glob("*.jsonl"):
        rows = [json.loads(line) | {"world": None} for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row in record.rows:
        row["rollout/reward_mean"] = None
    page = Page(write_report([record], tmp_path / "report.html"))
    assert "Held-out strict accuracy" in page.text
