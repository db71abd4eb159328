"""Text and JSON of others: what it says, or why it cannot be read."""

from __future__ import annotations

import pytest

from ngrpo_lora.records.texts import MAX_DEPTH, decoded, parse_json


def test_text_is_utf_8_with_or_without_a_mark():
    assert decoded("ä".encode(), "a") == decoded("ä".encode("utf-8-sig"), "a") == "ä"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"caf\xe9", "byte 3 of 'a.txt' is not UTF-8"),
        ("ab".encode("utf-16"), "byte 0 of 'a.txt' is not UTF-8"),
        ("ab".encode("utf-16-le"), "byte 1 of 'a.txt' is NUL, as in UTF-16"),
    ],
)
def test_text_in_another_encoding_is_refused(data: bytes, problem: str):
    with pytest.raises(ValueError, match=problem):
        decoded(data, "a.txt")


def test_json():
    assert parse_json('{"a": ["\\ud83d\\ude00", 1.5, null]}') == {"a": ["😀", 1.5, None]}
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert len(parse_json("[" + "[], " * 500 + "[]]")) == 501  # many brackets, and not deep


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('"\\ud800"', r"half a character, the lone surrogate \\ud800"),
        ('{"a": ["\\udc00"]}', "half a character"),
        ('{"\\ud800": 1}', "half a character"),
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
        ("[" * 100_000, "nested more than"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested more than"),
        ("9" * 5000, "digits"),
        ('{"a": 1', "Expecting .* at column 8"),
        ('{"a":\n1', "at line 2, column 2"),
    ],
)
def test_json_that_cannot_be_used_is_refused_in_one_line(text: str, problem: str):
    with pytest.raises(ValueError, match=problem) as error:
        parse_json(text)
    assert len(str(error.value).splitlines()) == 1
