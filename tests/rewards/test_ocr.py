"""OCR with the real model of rapidocr's wheel, on words that Pillow's font renders."""

from __future__ import annotations

import logging
import math
import socket
import sys
from functools import cache

import pytest
from PIL import Image, ImageDraw, ImageFont

from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards.ocr import Config, Reward, quoted, similarity
from ngrpo_lora.scoring.scorer import BoundReward, load_reward
from ngrpo_lora.types import Samples

PROMPT = 'a shop sign that says "Hello"'


@cache
def make_reward(exact: bool = False, detect: bool = True) -> Reward:
    return Reward(Config(name="ocr", exact=exact, detect=detect), "cpu")


def draw(
    text: str, size: tuple[int, int] = (256, 96), font_px: int = 40, xy: tuple[int, int] = (40, 24)
) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text(xy, text, "black", font=ImageFont.load_default(font_px))
    return image


# Score --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drawn", "score"),
    [("HELLO", 1.0), ("hello", 1.0), ("HEL LO", 1.0), ("HEILO", 0.8), ("HEL", 0.6), ("TRUCK", 0.0), ("", 0.0)],
)
def test_a_rendered_word_scores_its_share_of_right_letters(drawn: str, score: float):
    assert make_reward(detect=False)(draw(drawn), PROMPT, {}) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(("drawn", "score"), [("HELLO", 1.0), ("HEILO", 0.8), ("TRUCK", 0.0), ("", 0.0)])
def test_a_word_is_found_anywhere_in_an_image(drawn: str, score: float):
    image = draw(drawn, (300, 300), 32, (150, 220))
    assert make_reward()(image, PROMPT, {}) == pytest.approx(score, abs=1e-9)


def test_extra_text_is_free_in_flow_grpos_score_and_charged_in_the_exact_one():
    image = draw("HELLO YOU", (320, 96))
    assert make_reward(detect=False)(image, PROMPT, {}) == 1.0
    assert make_reward(exact=True, detect=False)(image, PROMPT, {}) == pytest.approx(0.4)
    assert make_reward(exact=True, detect=False)(draw("HELLO"), PROMPT, {}) == 1.0


def test_two_lines_are_read_in_order():
    image = draw("OPEN\nDAILY", (256, 256))
    assert make_reward()(image, 'a sign with "open daily"', {}) == 1.0
    assert make_reward()(image, 'a sign with "open" and "daily" on it', {}) == 1.0


def test_recognition_alone_takes_the_image_for_one_line_also_of_32_pixels():
    image = draw("STAR", (32, 32), 12, (1, 8))
    assert make_reward(detect=False)(image, '"star"', {}) == 1.0
    assert make_reward(detect=False)(draw("OPEN\nDAILY", (256, 256)), '"open daily"', {}) < 0.5


def test_text_read_with_less_confidence_is_none():
    strict = Reward(Config(name="ocr", detect=False, min_confidence=1.0), "cpu")
    assert strict(draw("HELLO"), PROMPT, {}) == 0.0


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_mode_is_read(mode: str):
    assert make_reward(detect=False)(draw("HELLO").convert(mode), PROMPT, {}) == 1.0


def test_an_image_of_one_pixel_has_no_text():
    assert make_reward()(Image.new("RGB", (1, 1)), PROMPT, {}) == 0.0


# What is wanted -----------------------------------------------------------------------------------------------------


def test_metadata_goes_before_the_prompt():
    assert make_reward(detect=False)(draw("HELLO"), 'a sign "Truck"', {"text": "hello"}) == 1.0
    assert make_reward(detect=False)(draw("HELLO"), "a sign", {"text": "HELP"}) == pytest.approx(0.5)


def test_a_prompt_without_quoted_text_is_a_failed_score_with_its_reason(caplog: pytest.LogCaptureFixture):
    reward = BoundReward(Config(name="ocr", detect=False), "cpu")
    samples = Samples([draw("HELLO"), draw("HELLO")], ["a red star", PROMPT], [{}, {}])
    with caplog.at_level(logging.WARNING, "ngrpo_lora.scoring"):
        missing, right = reward(samples).tolist()
    assert math.isnan(missing)
    assert right == 1.0
    assert "1 of 2 images are masked: ValueError: the prompt must hold the wanted text in double quotes" in caplog.text
    assert "got 'a red star'" in caplog.text


def test_quotes_may_be_typographic():
    assert quoted('"a b" and “c”, not \'d\' or ""') == ["a b", "c"]


@pytest.mark.parametrize(
    ("read", "wanted", "exact", "expected"),
    [
        ("kitten", "sitting", False, 1 - 3 / 7),
        ("sunday", "saturday", False, 1 - 3 / 8),
        ("", "abc", False, 0.0),
        ("xxabcxx", "abc", False, 1.0),
        ("xxabcxx", "abc", True, 0.0),
        ("abcx", "abc", True, 1 - 1 / 3),
        ("bca", "abc", True, 1 - 2 / 3),
    ],
)
def test_similarity_follows_from_the_levenshtein_distance(read: str, wanted: str, exact: bool, expected: float):
    assert similarity(read, wanted, exact) == pytest.approx(expected, abs=1e-12)


# What it needs ------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_of_the_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        raise AssertionError("it connects")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert Reward(Config(name="ocr"), "cpu")(draw("HELLO", (200, 200)), PROMPT, {}) == 1.0


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"reward ocr needs .* pip install onnxruntime 'rapidocr"):
        load_reward(Config(name="ocr"))


def test_without_its_models_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path):
    import rapidocr

    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=r"needs the model PP-OCRv6_det_small.onnx .* pip install 'rapidocr"):
        load_reward(Config(name="ocr"))
