"""The voting page in a real browser: what is clicked, typed, tapped and dragged is what the run is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, chromium
from playwright.sync_api import Browser, Locator, Page, expect
from vote_groups import make_group

from ngrpo_lora.guests.calls import in_thread
from ngrpo_lora.voting.ballots import Ballot, VotesFile
from ngrpo_lora.voting.voting import Voting

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

PATIENCE_MS = 60_000
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def voting(tmp_path: Path) -> Iterator[Voting]:
    opened = Voting(tmp_path / "votes.jsonl", undo_s=0)
    yield opened
    opened.close()


def ask(voting: Voting, number: int = 0) -> Future[np.ndarray]:
    """A group of six that waits; the future has its scores."""
    group = make_group(number, 6, f"picture {number}")
    waiting = in_thread(partial(voting.wait, group.prompt, group.images))
    while group.name not in voting.booth.waiting:
        time.sleep(0.02)
    return waiting


def opened(browser: Browser, voting: Voting, **settings: object) -> Page:
    """The page, which must not have an error of its own."""
    page = browser.new_page(**settings)  # pyright: ignore
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: pytest.fail(f"the page fails: {error}"))
    page.goto(voting.address)
    return page


def picture(page: Page, number: int) -> Locator:
    return page.locator(f'.picture[data-picture="{number}"]')


def said(voting: Voting) -> Ballot:
    return [*VotesFile(voting.booth.votes.path).ballots.values()][-1]


def test_clicks_mark_what_is_better_and_worse(browser: Browser, voting: Voting):
    waiting, page = ask(voting), opened(browser, voting)
    expect(page.locator("#prompt")).to_have_text("picture 0")
    expect(page.locator("#send")).to_be_disabled()
    picture(page, 2).click()
    picture(page, 5).dblclick()
    picture(page, 0).click(click_count=1)
    for _ in range(2):
        picture(page, 0).click()  # neither again
    page.locator("#send").click()
    scores = waiting.result(60)
    assert said(voting).orders == (((2,), (0, 1, 3, 4), (5,)),)
    assert scores.argmax() == 2
    assert scores.argmin() == 5
    expect(page.locator("#waiting")).to_be_visible()
    expect(page.locator("#figures")).to_contain_text("1 vote")
    page.close()


def test_keys_do_all_that_clicks_do(browser: Browser, voting: Voting):
    waiting = [ask(voting, number) for number in range(4)]
    page = opened(browser, voting)
    for number, keys in enumerate((["3", "Enter"], ["s"], ["n"])):
        expect(page.locator("#prompt")).to_have_text(f"picture {number}")
        for key in keys:
            page.keyboard.press(key)
    expect(page.locator("#prompt")).to_have_text("picture 3")
    page.keyboard.press("u")
    expect(page.locator("#prompt")).to_have_text("picture 2")
    assert [ballot.said for ballot in VotesFile(voting.booth.votes.path).ballots.values()] == ["order", "skip"]
    page.keyboard.press("n")
    expect(page.locator("#prompt")).to_have_text("picture 3")
    page.keyboard.press("s")
    scores = [one.result(60) for one in waiting]
    assert scores[0].argmax() == 2
    assert np.isnan(scores[1]).all()
    assert (scores[2] == 0).all()
    page.close()


def test_of_pairs_the_better_one_stays_and_one_may_stop_early(browser: Browser, voting: Voting):
    waiting, page = ask(voting), opened(browser, voting)
    page.get_by_role("radio", name="Pairs").click()
    shown = page.locator(".picture")
    expect(shown).to_have_count(2)
    first, second = (int(shown.nth(place).get_attribute("data-picture") or -1) for place in (0, 1))
    shown.nth(1).click()
    expect(picture(page, first)).to_have_count(0)
    third = int(shown.nth(0).get_attribute("data-picture") or -1)
    page.keyboard.press("ArrowRight")
    expect(picture(page, third)).to_have_count(0)
    page.locator("#send").click()
    scores = waiting.result(60)
    assert said(voting).orders == (((second,), (first,)), ((second,), (third,)))
    assert np.isnan(scores).sum() == 3
    page.close()


def test_a_ranking_is_dragged_and_tapped_and_may_be_partial(browser: Browser, voting: Voting):
    waiting, page = ask(voting), opened(browser, voting)
    page.get_by_role("radio", name="Rank").click()
    picture(page, 4).click()
    picture(page, 1).click()
    start, target = picture(page, 3).bounding_box(), picture(page, 4).bounding_box()
    assert start is not None
    assert target is not None
    page.mouse.move(start["x"] + 40, start["y"] + 40)
    page.mouse.down()
    page.mouse.move(target["x"] + 60, target["y"] + 60, steps=6)
    page.mouse.up()
    expect(page.locator(".picture").first).to_have_attribute("data-picture", "3")
    expect(picture(page, 3).locator(".badge")).to_have_text("1")
    page.locator("#send").click()
    scores = waiting.result(60)
    assert said(voting).orders == (((3,), (4,), (1,)),)
    assert [*np.flatnonzero(np.isfinite(scores))] == [1, 3, 4]
    page.close()


def test_a_phone_shows_it_and_is_tapped(browser: Browser, voting: Voting):
    waiting, page = ask(voting), opened(browser, voting, **PHONE)
    picture(page, 1).tap()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for button in page.locator("#actions button").all():
        box = button.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 44
    page.locator("#send").tap()
    assert waiting.result(60).argmax() == 1
    page.close()


def test_two_browsers_show_the_same_group_and_the_slower_is_told(browser: Browser, voting: Voting):
    waiting = ask(voting)
    pages = [opened(browser, voting) for _ in range(2)]
    for number, page in enumerate(pages):
        picture(page, number).click()
    pages[1].route("**/state", lambda route: route.abort())  # it has not heard yet
    voting.booth.undo_s = 3600
    pages[0].locator("#send").click()
    expect(pages[0].locator("#waiting")).to_be_visible()
    pages[1].locator("#send").click()
    expect(pages[1].locator(".message")).to_contain_text("from another window")
    voting.booth.undo_s = 0
    assert waiting.result(60).argmax() == 0
    for page in pages:
        page.close()


def test_whose_marks_are_overtaken_is_told_and_nobody_takes_back_a_vote_of_anothers(browser: Browser, voting: Voting):
    voting.booth.undo_s = 3600
    groups = [ask(voting), ask(voting, 1)]
    pages = [opened(browser, voting) for _ in range(2)]
    for page in pages:
        expect(page.locator("#prompt")).to_have_text("picture 0")
    picture(pages[1], 3).click()
    picture(pages[0], 1).click()
    pages[0].locator("#send").click()
    expect(pages[1].locator(".message")).to_contain_text("Your marks do not count")
    expect(pages[1].locator("#prompt")).to_have_text("picture 1")
    picture(pages[1], 5).click()
    pages[0].keyboard.press("u")  # the other one is not disturbed, nor its vote taken back afterwards
    expect(pages[0].locator("#prompt")).to_have_text("picture 0")
    pages[1].wait_for_timeout(2000)
    expect(picture(pages[1], 5).locator(".badge")).to_have_text("✓")
    pages[1].locator("#send").click()
    expect(pages[1].locator(".message")).to_have_count(0)
    expect(pages[1].locator("#prompt")).to_have_text("picture 0")
    picture(pages[0], 2).click()
    pages[0].locator("#send").click()
    expect(pages[0].locator("#waiting")).to_be_visible()
    pages[0].keyboard.press("u")
    expect(pages[0].locator("#prompt")).to_have_text("picture 0")
    expect(pages[0].locator("#undo")).to_be_disabled()
    picture(pages[0], 2).click()
    pages[0].locator("#send").click()
    expect(pages[0].locator("#waiting")).to_be_visible()
    voting.booth.undo_s = 0
    assert [waiting.result(60).argmax() for waiting in groups] == [2, 5]
    for page in pages:
        page.close()


def test_a_page_that_was_opened_again_takes_back_the_last_vote(browser: Browser, voting: Voting):
    voting.booth.undo_s = 3600
    waiting, page = ask(voting), opened(browser, voting)
    picture(page, 1).click()
    page.locator("#send").click()
    expect(page.locator("#waiting")).to_be_visible()
    page.close()
    page = opened(browser, voting)
    page.locator("#undo").click()
    picture(page, 4).click()
    page.locator("#send").click()
    expect(page.locator("#waiting")).to_be_visible()
    voting.booth.undo_s = 0
    assert waiting.result(60).argmax() == 4
    page.close()


def test_a_run_that_is_gone_says_so_and_where_votes_are(browser: Browser, voting: Voting):
    ask(voting)
    page = opened(browser, voting)
    expect(page.locator("#prompt")).to_have_text("picture 0")
    picture(page, 0).click()
    voting.close()
    page.locator("#send").click()
    expect(page.locator(".message")).to_contain_text("your vote was not counted")
    expect(page.locator("#waiting .title")).to_have_text("The run has ended, or cannot be reached")
    expect(page.locator("#waiting .detail")).to_contain_text("votes.jsonl")
    page.close()


def test_a_damaged_file_is_named_where_the_person_looks(browser: Browser, tmp_path: Path):
    path = tmp_path / "votes.jsonl"
    path.write_text('{"group": "cut of')
    voting = Voting(path)
    page = opened(browser, voting)
    expect(page.locator(".message")).to_contain_text("votes.jsonl: line 1 cannot be read")
    page.locator(".message button").click()
    expect(page.locator(".message")).to_have_count(0)
    page.close()
    voting.close()
