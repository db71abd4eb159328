"""Values are read as people mean them: by what stands there, and by what their key wants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from ngrpo_lora.config.section import Section
from ngrpo_lora.config.words import MAX_DEPTH, MAX_VALUES, as_meant, number_meant, read_value, read_yaml, settled


class Wanted(Section, frozen=True):
    """One key for each kind of value."""

    text: str = ""
    perhaps: str | None = None
    whole: int = 0
    number: float = 0.0
    truth: bool = False
    either: str | float = ""


def read(key: str, word: str) -> Any:
    return getattr(Wanted.model_validate({key: read_value(word)}), key)


@pytest.mark.parametrize(
    "word",
    [
        *("010", "1:30", "2025", "2025-02-28", "2025-02-30", "2025-02-28 10:00:00", "1e3", "1_000", "0x10", "+5", ".5"),
        *("yes", "No", "on", "OFF", "a #b", "a: b", "- a", "*a", "&a", "!a", "!!int a", "@a", "%a", "| a", "? a", "<<"),
        *("=", "#", "a\nb", "12:30:45", "tRue", "nan", "inf", "it's", 'a "b"', "C:\\x"),
    ],
)
def test_where_text_is_wanted_a_word_is_the_text_that_was_written(word: str):
    assert (read("text", word), read("perhaps", word)) == (word, word)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *(("0", 0), ("-0", 0), ("+5", 5), ("-12", -12), ("1_000", 1000), ("1e3", 1000), ("2E+2", 200), (" 3\t", 3)),
        *(("0x10", 16), ("0o10", 8), ("0b11", 3), ("9" * 30, int("9" * 30))),
    ],
)
def test_whole_numbers(word: str, value: int):
    assert read("whole", word) == value
    assert read("number", word) == float(value)


@pytest.mark.parametrize(
    ("word", "value"), [(".5", 0.5), ("+.5", 0.5), ("5.", 5.0), ("1e-4", 1e-4), ("-2.5E1", -25.0), ("00.5", 0.5)]
)
def test_numbers(word: str, value: float):
    assert read("number", word) == value
    assert read("either", word) == value


@pytest.mark.parametrize(
    "word", ["010", "-010", "00", "1:30", "1,000", "2025-02-28", "9" * 5000, "٣", "0_7", "yes", "1_"]
)
def test_what_may_be_another_number_is_text_which_no_number_takes(word: str):
    assert isinstance(read_value(word), str)
    for key in ("whole", "number"):
        with pytest.raises(ValidationError):
            read(key, word)


@pytest.mark.parametrize("word", [".inf", "-.inf", ".nan", "1e400"])
def test_a_number_that_is_not_finite_is_refused(word: str):
    assert not math.isfinite(read_value(word))
    with pytest.raises(ValidationError, match="finite"):
        read("number", word)


def test_truth_values():
    assert [read("truth", word) for word in ("true", "True", "TRUE", "yes", "On")] == [True] * 5
    assert [read("truth", word) for word in ("false", "no", "OFF")] == [False] * 3
    for word in ("1", "y", "tRue", '"yes"'):
        with pytest.raises(ValidationError):
            read("truth", word)


def test_null():
    assert [read_value(word) for word in ("", "null", "Null", "NULL", "~", " ")] == [None] * 6


def test_brackets_and_quotes_are_yaml():
    assert read_value("[1, a b, '2', .5]") == [1, "a b", "2", 0.5]
    assert read_value("{a.txt: 3, 2025: x, yes: [no]}") == {"a.txt": 3, "2025": "x", "yes": ["no"]}
    assert read_value("'010 # x'") == "010 # x"
    assert read_value(r'"\ud83d\ude00"') == "😀"  # as JSON writes it


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("'a' #b", "'#b' stands after its end"),
        ("[a] b", "'b' stands after its end|expected"),
        ("{[a, b]: 1}", "a key must be one word"),
        ("{a: 1, a: 2}", "key 'a' is given twice"),
        ("[!!int a]", "the tag !!int is not read"),
        ("[!!python/name:os.system x]", "is not read"),
        (r'"\ud800"', "half a character"),
        (r'"a\0b"', "a NUL character"),
        ("caf\udce9", "half a character"),
        ("[" * 100_000, "nested more than"),
        ("[a", "expected"),
    ],
)
def test_what_is_no_value_is_an_error_of_yaml(word: str, problem: str):
    with pytest.raises(yaml.YAMLError, match=problem):
        read_value(word)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &a [*a]", "nested more than"),
        ("a: &a {<<: *a}", "nested more than"),
        (
            "0: &a0 [x, x, x]\n" + "".join(f"{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 20)),
            f"more than {MAX_VALUES} values",
        ),
        ("0: &a0 [x]\n" + "".join(f"{i}: &a{i} [[[[*a{i - 1}]]]]\n" for i in range(1, 20)), "nested more than"),
        ("".join(f"{' ' * i}a:\n" for i in range(200)), "nested more than"),
        ("? [a, b]\n: 1", "a key must be one word"),
        ("a: 1\n---\na: 2", "another document"),
        ("a: !!binary aGk=", "the tag !!binary is not read"),
    ],
)
def test_a_document_that_is_refused(text: str, problem: str):
    with pytest.raises(yaml.YAMLError, match=problem):
        read_yaml(text)


def test_anchors_aliases_and_merge_keys_are_read():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b}\nd: *a\n'<<': 4"
    both = {"x": 1, "y": 3}
    assert read_yaml(text) == {"a": {"x": 1, "y": 2}, "b": both, "c": both, "d": {"x": 1, "y": 2}, "<<": 4}
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert read_yaml(deepest) is not None


def test_a_value_of_which_no_key_says_what_it_wants_is_in_pythons_own_types():
    value = settled(read_value("{a: [1e3, 0.5, 2025-01-01, true, null], b: text}"))
    assert value == {"a": [1000, 0.5, "2025-01-01", True, None], "b": "text"}
    assert [type(one) for one in value["a"][:3]] == [int, float, str]
    with pytest.raises(ValueError, match='must say true or false, .* got no; write false or "no"'):
        settled(read_value("{a: [no]}"))


def test_a_value_passes_unchanged_where_its_key_takes_it():
    assert as_meant(read_value("[2025]"), tuple[str, ...]) == [2025]
    assert as_meant("010", int) == "010"


@pytest.mark.parametrize(
    ("text", "number"),
    [("010", "10"), ("-007", "-7"), ("1,000", "1000"), ("8", "8 without quotes"), ("1:30", None), ("eight", None)],
)
def test_the_number_that_a_text_was_meant_as(text: str, number: str | None):
    assert number_meant(text) == number
