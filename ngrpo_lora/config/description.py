"""Describes every configuration key, for `ngrpo config --describe`, ComfyUI's widgets and error messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ngrpo_lora import registry
from ngrpo_lora.config.plugins import DEFAULT_ALGORITHM, algorithm_settings, reward_class
from ngrpo_lora.config.run import RunConfig
from ngrpo_lora.config.section import Section

__all__ = ["Option", "describe", "describe_reward"]


@dataclass(frozen=True)
class Option:
    """One configuration key: its dotted name, what it accepts, its default and its meaning."""

    key: str
    type: str
    default: Any
    description: str
    is_section: bool = False


def describe(data: Mapping[str, Any] | None = None) -> Iterator[Option]:
    """Every key in the schema's order, a section before its keys; `data` chooses the algorithm (default: neighbor)."""
    section = (data or {}).get("algorithm")
    name = section if isinstance(section, str) else section.get("name") if isinstance(section, Mapping) else None
    yield from _describe(RunConfig, "", name if isinstance(name, str) else DEFAULT_ALGORITHM)


def describe_reward(name: str) -> Iterator[Option]:
    """The settings that an entry `{name: NAME, ...}` of rewards.train may have."""
    yield from _describe(reward_class(name), "", DEFAULT_ALGORITHM)


def _describe(model: type[Section], prefix: str, algorithm: str) -> Iterator[Option]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        annotation = field.annotation
        if key == "algorithm":
            known = algorithm in registry.names(registry.ALGORITHM_SETTINGS)
            annotation = algorithm_settings(algorithm if known else DEFAULT_ALGORITHM)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield Option(key, "section", None, field.description or "", is_section=True)
            yield from _describe(annotation, f"{key}.", algorithm)
        else:
            yield Option(key, type_text(annotation, field.metadata), _default(field), _description(model, name))


def _description(model: type[BaseModel], name: str) -> str:
    """A field's description, else that of the field it overrides."""
    bases = [base for base in model.__mro__ if issubclass(base, Section) and name in base.model_fields]
    return next((text for base in bases if (text := base.model_fields[name].description)), "")


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        return [
            entry.model_dump(mode="json", exclude_defaults=True) if isinstance(entry, BaseModel) else entry
            for entry in value
        ]
    return value


def type_text(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """What a key accepts, in words for people: `int >= 2`, `number > 0 | null`, `a | b`."""
    plain = {int: "int", float: "number", str: "text", bool: "true | false", type(None): "null"}
    if annotation in plain:
        return f"{plain[annotation]} {', '.join(_bounds(limits))}".strip()
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin is Annotated:
        return type_text(arguments[0], arguments[1:])
    if origin is tuple:
        items = ["..." if item is Ellipsis else type_text(item) for item in arguments]
        return f"[{', '.join(items)}]"
    if origin is dict:
        key, value = map(type_text, arguments)
        return f"{{{key}: {value}}}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        first, second, *_ = annotation.model_fields
        return f"{{{first}, {second}, ...}}"
    first, *rest = arguments  # a union; its limits are those of the first member
    return " | ".join([type_text(first, limits), *map(type_text, rest)])


def _bounds(limits: Sequence[Any]) -> Iterator[str]:
    """Limits in words, such as `>= 2`, from annotated_types' or Field's metadata."""
    symbols = {annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<"}
    for limit in limits:
        if isinstance(limit, FieldInfo):
            yield from _bounds(limit.metadata)
        elif type(limit) in symbols:
            (bound,) = astuple(limit)
            if bound != 2**63:
                yield f"{symbols[type(limit)]} {bound:g}"
