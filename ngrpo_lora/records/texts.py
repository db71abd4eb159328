"""Text and JSON from files that others wrote: either what it says, or a reason in words why it cannot be read."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["check_text", "decoded", "parse_json", "separator"]

MAX_DEPTH = 100  # far below what Python's recursion allows, as others walk through the value too


def decoded(data: bytes, name: str) -> str:
    """The UTF-8 text of the file `name`, with or without a byte order mark.

    Raises:
        ValueError: it is in another encoding, such as "byte 3 of 'a.txt' is not UTF-8".
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of {name!r} is not UTF-8") from None
    if "\0" in text:
        raise ValueError(f"byte {data.index(0)} of {name!r} is NUL, as in UTF-16")
    return text


def check_text(text: str) -> None:
    """Check that a text can be written as UTF-8.

    Raises:
        ValueError: it holds half of a character, which is called a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half a character, the lone surrogate \\u{ord(text[error.start]):04x}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not valid, nested deeper than `MAX_DEPTH`, a number that is too long, a key given twice, or half a
            character in a text; the message is one line that says where or what.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
        deep = text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"{error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        value, deep = None, True
    if deep:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if "\\u" in text:  # only an escape can be half a character
        check_text(json.dumps(value, ensure_ascii=False))
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0


def separator(table: str) -> str:
    """What a table's header has between its columns: a comma, or a semicolon, as Excel writes in much of Europe."""
    header = table.lstrip().partition("\n")[0]
    return ";" if ";" in header and "," not in header else ","
