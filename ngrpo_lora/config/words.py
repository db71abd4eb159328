"""Values as people write them, in YAML and after `key=`: no word becomes another value than the one that was meant.

PyYAML reads YAML 1.1, in which 010 is 8, 1:30 is 90, 2025-02-28 is a date, `no` is false and 1e-4 is text. Here a plain
word is null, true, false or a number where it says so at first sight, and text otherwise. It also keeps how it was
written, as its key may want something else: a folder 2025 or 1e3, `yes` for true. `as_meant` gives each key its own.

Keys are text; timestamps and tags other than !!str are not read; what is deep or large by aliases is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

__all__ = ["Real", "YesNo", "as_meant", "number_meant", "read_value", "read_yaml", "settled"]

MAX_DEPTH = 50
MAX_VALUES = 100_000  # with every alias written out
MAX_DIGITS = 300  # a float holds no more

PLAIN, TEXT, MERGE = "!plain", "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+")
REAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
YES_NO = {"yes": True, "on": True, "no": False, "off": False}


class RefusedError(yaml.MarkedYAMLError):
    """YAML that is valid, and is not read here; its note says what to do instead."""


class Whole(int):
    """A whole number, and how it was written."""

    written: str


class Real(float):
    """A number, and how it was written."""

    written: str


class YesNo(str):
    """`yes`, `no`, `on` or `off`: a truth value for a key that wants one, text for a key that wants text."""


def plain_word(text: str) -> Any:
    """The value of a word that stands without quotes."""
    if text.lower() in CONSTANTS and text in (text.lower(), text.title(), text.upper()):
        return CONSTANTS[text.lower()]
    if text.lower() in YES_NO:
        return YesNo(text)
    number: Whole | Real | None = None
    if len(text) <= MAX_DIGITS and WHOLE.fullmatch(text):
        number = Whole(text, 0)
    elif NOT_FINITE.fullmatch(text):
        number = Real(text.replace(".", ""))
    elif len(text) <= MAX_DIGITS and REAL.fullmatch(text):
        number = Real(text)
        if "." not in text and number.is_integer() and abs(number) < 2**53:
            number = Whole(number)  # 1e3 is as whole as 1000
    if number is None:
        return text
    number.written = text
    return number


def sound(text: str) -> str:
    r"""A text in which pairs of surrogates are characters, as JSON writes them: "\ud83d\ude00".

    Raises:
        ValueError: half a pair, or a NUL, which no file and no tokenizer takes.
    """
    try:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError("half a character, a lone surrogate or a byte that is not UTF-8; write it anew") from None
    if "\0" in text:
        raise ValueError("a NUL character; leave it out")
    return text


class _Loader(yaml.SafeLoader):
    """Safe YAML by the rules that head this module; what is refused is a YAMLError with its place."""

    depth = 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, 1, {})
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if (tag := getattr(event, "tag", None)) not in (None, "!", TEXT):
            raise _refusal(f"the tag {tag.replace('tag:yaml.org,2002:', '!!')} is not read; leave it out", event)
        if self.depth == MAX_DEPTH:
            raise _refusal(TOO_DEEP, event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal("a key must be one word, not a list or a mapping; write key: value", key)
            if key.value in seen:
                raise _refusal(f"key {key.value!r} is given twice; keep one", key)
            seen.add(key.value)
            key.tag = MERGE if key.value == "<<" and key.style is None else TEXT
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        plain = kind is yaml.ScalarNode and implicit[0]
        return PLAIN if plain else super().resolve(kind, value, implicit)

    def construct_scalar(self, node: yaml.Node) -> Any:
        value = super().construct_scalar(node)  # type: ignore[arg-type]
        try:
            return sound(value)
        except ValueError as error:
            raise _refusal(f"text holds {error}", node) from None


def _construct_plain(loader: _Loader, node: Any) -> Any:
    return plain_word(loader.construct_scalar(node))


_Loader.add_constructor(PLAIN, _construct_plain)

TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep; write it flatter"


def _refusal(problem: str, what: Any) -> RefusedError:
    rule, _, remedy = problem.partition("; ")
    return RefusedError(None, None, rule, what.start_mark, note=remedy)


def _measure(node: yaml.Node, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node stands for, and how deep they are nested, with its aliases written out.

    Raises:
        YAMLError: too many or too deep, which a node that holds itself is, too.
    """
    if id(node) not in known:
        if depth > MAX_DEPTH:
            raise _refusal(TOO_DEEP, node)
        inner = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
        children = [child for one in inner for child in (one if isinstance(one, tuple) else (one,))]
        found = [_measure(child, depth + 1, known) for child in children]
        known[id(node)] = 1 + sum(size for size, _ in found), 1 + max([height for _, height in found], default=0)
    size, height = known[id(node)]
    if size > MAX_VALUES or depth + height > MAX_DEPTH + 1:
        raise _refusal(
            f"its aliases stand for more than {MAX_VALUES} values; use fewer" if size > MAX_VALUES else TOO_DEEP, node
        )
    return size, height


def read_yaml(text: str) -> Any:
    """The value of a YAML document; None where it is empty.

    Raises:
        YAMLError: it is not valid, or one of the things that head this module.
    """
    return yaml.load(text, _Loader)


def read_value(text: str) -> Any:
    """The value after `key=`: a list or mapping in brackets, text in quotes, or else all of it as one plain word.

    So `#`, `: `, `*` and `!` need no quotes, and no part of it is dropped as a comment.

    Raises:
        YAMLError: brackets or quotes that are not valid, or text after them.
    """
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        try:
            return plain_word(sound(text))
        except ValueError as error:
            rule, _, remedy = str(error).partition("; ")
            raise RefusedError(problem=f"text holds {rule}", note=remedy) from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        assert node is not None  # the first character is one of a value
        if rest := text[node.end_mark.index :].strip():
            raise RefusedError(problem=f"{rest!r} stands after its end", note="put all of it in quotes, or drop that")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def as_meant(value: Any, annotation: Any) -> Any:
    """A value as a key of this type means it: what was written where it wants text, true for `yes` where a truth."""
    wanted = _kinds(annotation)
    if isinstance(value, Whole | Real) and str in wanted and not wanted & {int, float}:
        return value.written
    return YES_NO[value.lower()] if isinstance(value, YesNo) and bool in wanted else value


def _kinds(annotation: Any) -> set[Any]:
    """The members of a union, without what is annotated to them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(arguments[0])
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, arguments))
    return {annotation}


def settled(value: Any) -> Any:
    """A copy of a value of which no key says what it wants, in Python's own types.

    Raises:
        ValueError: it holds `yes`, `no`, `on` or `off`, which may be a truth value or text.
    """
    if isinstance(value, YesNo):
        truth = str(YES_NO[value.lower()]).lower()
        raise ValueError(f'must say true or false, or put text in quotes, got {value!s}; write {truth} or "{value!s}"')
    if isinstance(value, Mapping):
        return {key: settled(one) for key, one in value.items()}
    if isinstance(value, list):
        return [settled(one) for one in value]
    return int(value) if isinstance(value, Whole) else float(value) if isinstance(value, Real) else value


def number_meant(text: str) -> str | None:
    """The number that a text must have been meant as, as it should be written; None where it is unclear.

    Such as 10 for `010` and 1000 for `1,000`.
    """
    if len(text) <= MAX_DIGITS and re.fullmatch(r"[-+]?0[0-9]+|[-+]?[0-9]{1,3}(,[0-9]{3})+", text):
        return str(int(text.replace(",", "")))
    number = plain_word(text)
    return f"{text} without quotes" if isinstance(number, Whole | Real) and math.isfinite(number) else None
