"""Turns pydantic's validation errors into our own messages: rule, value, remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ngrpo_lora import registry
from ngrpo_lora.config.description import describe
from ngrpo_lora.config.plugins import algorithm_settings, reward_class, reward_section
from ngrpo_lora.config.section import listed
from ngrpo_lora.config.tracking import TrackerConfig
from ngrpo_lora.config.words import Real, number_meant

__all__ = ["rule_in_words", "show_value"]

MAX_SHOWN = 300


def problems_in_words(error: ValidationError, data: Mapping[str, Any]) -> list[str]:
    """One message for each faulty key of a configuration: rule, value, remedy."""
    options = {option.key: option for option in describe(data)}
    lines: dict[str, list[tuple[str, Any]]] = {}
    for detail in error.errors():
        parts = [str(part) for part in detail["loc"]]
        if detail["type"] == "extra_forbidden":
            key = ".".join(parts)
            known = [] if _in_tracker(parts) else [*options]
            near = (
                _in_section(key, options)
                or _other_algorithm(key)
                or _nearest_key(key, [*known, *_entry_keys(parts, data)])
            )
            shown = key if key.isprintable() and key == key.strip() else repr(key)
            lines[key] = [(f"unknown key {shown}{near}", None)]
            continue
        # Drop what pydantic appends for the branches of a union: they are no keys.
        while parts and not parts[-1].isdigit() and ".".join(parts) not in options and not _in_entry(parts):
            parts.pop()
        lines.setdefault(".".join(parts), []).append((rule_in_words(detail), detail["input"]))
    problems: list[str] = []
    for key, rules in lines.items():
        rule, value = " or ".join(dict.fromkeys(text for text, _ in rules)).replace(" or must be", " or"), rules[0][1]
        if rule.startswith("unknown key"):
            problems.append(rule)
        elif not rule.startswith(("must", "names")):
            problems.append(rule)  # a complete sentence of a check across keys
        else:
            option = options.get(key)
            got = "" if ", got " in rule or rule.startswith("names") else f", got {show_value(value)}"
            meaning = f" ({option.description.rstrip('.')})" if option is not None and got else ""
            problems.append(f"{key} {rule}{got}{_written(rule, value)}{meaning}")
    return problems


def _written(rule: str, value: Any) -> str:
    """How to write the number that a text was meant as; empty where no number is wanted, or it is unclear which."""
    number = number_meant(value) if "number" in rule and isinstance(value, str) else None
    return f"; write {number}" if number else ""


def _in_section(key: str, known: Mapping[str, Any]) -> str:
    """A hint after a key that is right but for its dots, as `key=value` has them and YAML does not."""
    section, _, name = key.rpartition(".")
    return f" with dots, which only key=value has; in YAML write {section}: {{{name}: ...}}" if key in known else ""


def _other_algorithm(key: str) -> str:
    """A hint after a key that other algorithms than the chosen one have; empty after any other key."""
    section, _, leaf = key.partition(".")
    names = registry.names(registry.ALGORITHM_SETTINGS) if section == "algorithm" else []
    owners = [name for name in names if leaf in algorithm_settings(name).model_fields]
    if not owners:
        return ""
    return f", which is of algorithm={' and '.join(owners)}; leave it out, or choose that algorithm"


def _in_reward(parts: Sequence[str]) -> bool:
    """Whether a key lies within an entry of a list of rewards."""
    return len(parts) > 3 and tuple(parts[:2]) in (("rewards", "train"), ("evaluation", "rewards"))


def _in_tracker(parts: Sequence[str]) -> bool:
    """Whether a key is one of an entry of the list of trackers."""
    return len(parts) == 3 and parts[0] == "tracking"


def _in_entry(parts: Sequence[str]) -> bool:
    """Whether a key lies within an entry of a list, whose keys no list of all options has."""
    return _in_reward(parts) or _in_tracker(parts)


def _entry_keys(parts: Sequence[str], data: Mapping[str, Any]) -> Iterator[str]:
    """The keys that are known in the entry of a list that `parts` lies in; none outside of such entries."""
    if _in_tracker(parts):
        yield from (".".join([*parts[:2], name]) for name in TrackerConfig.model_fields)
    if _in_reward(parts):
        section = reward_section(data["rewards"]) if parts[0] == "rewards" else data["evaluation"]
        entry = listed(section[parts[1]])[int(parts[2])]
        yield from (".".join([*parts[:3], name]) for name in reward_class(entry.get("name")).model_fields)


_RULES = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be more than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt:g}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "literal_error": "must be {expected}",
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a section of keys",
    "dict_type": "must be a section of keys",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "missing": "must be given",
    "extra_forbidden": "is unknown",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}


def show_value(value: Any) -> str:
    """A value as a user writes it: null, true and false as in YAML, all else as in Python; what is long is cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = value.written if isinstance(value, Real) and math.isinf(value) else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def rule_in_words(detail: ErrorDetails) -> str:
    """The broken rule in our words; messages of our own validators pass unchanged."""
    context = detail.get("ctx", {})
    if detail["type"] == "value_error":
        return str(context["error"])
    if detail["type"] == "string_pattern_mismatch":
        return "must be one of these forms"
    if detail["type"] in _RULES:
        return _RULES[detail["type"]].format(**context)
    return f"must be valid: {detail['msg']}"


def _nearest_key(key: str, keys: Sequence[str]) -> str:
    """A hint after an unknown key: the key spelt most alike, first of its own section, else which keys there are."""
    prefix, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == prefix}
    leaves = {k.rpartition(".")[2]: k for k in reversed(keys)}  # the first of its name
    for known in (siblings, leaves):
        close = difflib.get_close_matches(leaf, known, n=1, cutoff=0.6)
        if close:
            return f"; did you mean {known[close[0]]}?"
    if siblings:
        return f"; known are {', '.join(siblings.values())}"
    return "; `ngrpo config --describe` lists all keys"
