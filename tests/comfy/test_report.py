"""The report of a run in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, chromium
from playwright.sync_api import Browser
from report_runs import HOSTILE, write_run

from ngrpo_lora.evaluation.report.page import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_fits_shows_prompts_as_they_are_and_moves_by_the_keyboard(
    browser: Browser, tmp_path: Path, width: int, scheme: str
):
    path = write_report([write_run(tmp_path / "run")], tmp_path / "report.html")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # pyright: ignore
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    assert page.get_by_text(HOSTILE).count() >= 2
    slider = page.get_by_role("slider").first
    slider.focus()
    page.keyboard.press("End")
    assert slider.evaluate("(input) => getComputedStyle(input.parentElement).getPropertyValue('--at')") == "100%"
    box = slider.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    shown = page.locator(".over").first.evaluate("(over) => getComputedStyle(over).clipPath")
    assert abs(float(slider.input_value()) - 25) <= 1
    assert abs(float(re.findall(r"([\d.]+)%", shown)[0]) - 75) <= 1  # so much of the base is cut off
    ink, paper = page.evaluate("['color', 'backgroundColor'].map((key) => getComputedStyle(document.body)[key])")
    dark, light = (int(color.removeprefix("rgb(").partition(",")[0]) for color in (ink, paper))
    assert (dark < light) == (scheme == "light")
    assert said == []
    page.close()
