"""Reads a RunConfig from presets, YAML files and `key=value` overrides, and writes one as YAML."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ngrpo_lora import registry
from ngrpo_lora.config.hub import hub_section
from ngrpo_lora.config.paths import expanded
from ngrpo_lora.config.plugins import DEFAULT_ALGORITHM, RewardConfig, reward_section
from ngrpo_lora.config.problems import problems_in_words, show_value
from ngrpo_lora.config.run import RunConfig
from ngrpo_lora.config.words import read_value, read_yaml
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.records.texts import decoded

__all__ = [
    "changed_keys",
    "dump_config",
    "flatten",
    "load_config",
    "parse_config",
    "parse_reward_entries",
    "parse_settings",
    "parse_value",
    "preset_names",
]


PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "demo"


class _Dumper(yaml.SafeDumper):
    """YAML with one key a line, and lists of plain values on their key's line."""


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    plain = not any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


_Dumper.add_representer(list, _represent_list)


def preset_names() -> list[str]:
    """Names of the presets that the package ships, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(config: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """A checked RunConfig from a YAML file or preset and `key=value` overrides.

    Args:
        config: path of a YAML file, or the name of a preset; None is the preset `demo`.
        overrides: `section.key=value`, the value a plain word, or YAML in brackets or quotes; later stages win:
            defaults, file, overrides. A file that `extends` a preset or another file (by its path beside the first)
            has precedence over that.

    Raises:
        ConfigError: anything wrong with the file, the keys or the values; one line per problem.
    """
    data = _read(_find(config))
    _apply(data, overrides)
    return parse_config(data)


def parse_config(data: Mapping[str, Any]) -> RunConfig:
    """A checked RunConfig from nested mappings, with ConfigError in place of pydantic's ValidationError."""
    try:
        return RunConfig.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(problems_in_words(error, data)) from None


def parse_reward_entries(entries: Sequence[Any]) -> tuple[RewardConfig, ...]:
    """Checked entries of `rewards.train`: names, mappings, or entries that are already checked.

    Raises:
        ConfigError: as `parse_config`; keys are the reward's own, without the section's name before them.
    """
    try:
        return parse_config({"rewards": {"train": [*entries]}}).rewards.train
    except ConfigError as error:
        raise ConfigError(re.sub(r"rewards\.train(\.[0-9]+)?[. ]?", "", line) for line in error.problems) from None


def parse_settings(text: str) -> dict[str, Any]:
    """Parse a section as people type it: lines of `key=value`, as for the command, or YAML.

    Raises:
        ConfigError: the text is neither.
    """
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    settings: dict[str, Any] = {}
    if all(re.match(r"[\w.]+\s*=", line) for line in lines):
        _apply(settings, [re.sub(r"\s*=\s*", "=", line, count=1) for line in lines])
        return settings
    try:
        found = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"settings must be lines of key=value, or YAML; the text {_yaml_problem(error)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"settings must be lines of key=value, or YAML's key: value, got {text!r}")
    return found


def parse_value(key: str, text: str) -> Any:
    """Parse the value of an override of `key`: a plain word, or YAML in brackets or quotes.

    Raises:
        ConfigError: it is not valid.
    """
    try:
        return read_value(text)
    except yaml.YAMLError as error:
        rule, remedy = _rule_and_remedy(error)
        raise ConfigError(
            f"{key} must be a YAML value, got {show_value(text)} ({rule}){remedy or '; put text in quotes'}"
        ) from None


def dump_config(config: RunConfig) -> str:
    """The complete configuration as YAML; `load_config` reads it back to an equal one."""
    values = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, default_flow_style=False)
    return f"# Complete configuration of an ngrpo-lora run. Run it with: ngrpo train THIS_FILE\n{values}"


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """The keys whose values differ between two configurations, as `key: old -> new` with dotted keys."""
    before, after = (dict(flatten(config.model_dump(mode="json"))) for config in (old, new))
    keys = [*before, *(key for key in after if key not in before)]
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give the values of nested mappings by dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _find(config: str | Path | None) -> Path:
    """The file behind a path or a preset's name."""
    if config is None:
        return PRESETS / f"{DEFAULT_PRESET}.yaml"
    try:
        path = Path(expanded(os.fspath(config)))
    except ValueError as error:
        raise ConfigError(f"config {error}") from None
    if os.path.isfile(path):
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        other = "is a pipe or a device, and no file" if os.path.exists(path) else "does not exist"
        what = "is a folder" if os.path.isdir(path) else other
        raise ConfigError(f"config file {str(config)!r} {what}; give a YAML file or a preset: {_presets()}")
    if str(config) not in preset_names():
        hint = registry.nearest(str(config), preset_names())
        raise ConfigError(f"config must be a YAML file or one of the presets {_presets()}, got {str(config)!r}{hint}")
    return PRESETS / f"{config}.yaml"


def _presets() -> str:
    """Names of presets for messages, without the variants for a memory size (`-24gb`, `-8x80gb`)."""
    return ", ".join(name for name in preset_names() if not re.search(r"-(\d+x)?\d+gb$", name))


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file, over those of the preset or file that it `extends`."""
    data = _read_alone(path)
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be the name of a preset or the path of a file, got {base!r}")
    chain = (*extending, path.resolve())
    found = _find(path.parent / base if os.path.isfile(path.parent / base) else base)
    if found.resolve() in chain:
        names = " -> ".join(str(file) for file in (*chain, found.resolve()))
        raise ConfigError(f"{path}: extends must not lead back to the file itself, but {names}; drop one of them")
    return _over(_read(found, chain), data)


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Lay `own` over `base`: sections key by key, all else as a whole; a new algorithm drops the old one's settings."""
    result, own = _written_out(base), _written_out(own)
    for key, value in own.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            name = old.get("name", DEFAULT_ALGORITHM)
            other = key == "algorithm" and value.get("name", name) != name
            result[key] = value if other else old | value
        else:
            result[key] = value
    return result


def _written_out(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration in which sections given in short are written in full."""
    long = dict(data)
    if "rewards" in data:
        long["rewards"] = reward_section(data["rewards"])
    if "hub" in data:
        long["hub"] = hub_section(data["hub"])
    if isinstance(data.get("algorithm"), str):
        long["algorithm"] = {"name": data["algorithm"]}
    return long


def _read_alone(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(decoded(path.read_bytes(), str(path)))
    except ValueError as error:
        raise ConfigError(f"a config must be UTF-8 text, but {error}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} {_yaml_problem(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got {reprlib.repr(data)}")
    return data


def _yaml_problem(error: yaml.YAMLError) -> str:
    rule, remedy = _rule_and_remedy(error)
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"is not valid YAML: {rule}{place}{remedy}"


def _rule_and_remedy(error: yaml.YAMLError) -> tuple[str, str]:
    """What a YAML error says, in one line, and `; ` with what to do, where that is known."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"it holds the character {chr(error.character)!r}, number {error.position + 1}", "; leave it out"
    if not isinstance(error, yaml.MarkedYAMLError) or not error.problem:
        return " ".join(str(error).split()), ""
    if "found another document" in error.problem:
        return "it holds a second document", "; keep one"
    note = "write spaces, not tabs" if r"'\t'" in error.problem else error.note
    return error.problem, f"; {note}" if note else ""


def _apply(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write `key=value` overrides into `data`."""
    problems: list[str] = []
    given: dict[str, Any] = {}
    for override in sorted(overrides, key=_turn):
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(f"an override must look like key=value, got {override!r}; for example rollout.num_steps=8")
            continue
        try:
            value = parse_value(key, text)
        except ConfigError as error:
            problems += error.problems
            continue
        key = _full_key(key, value)
        if problem := _conflict(key, value, given) or _write(data, key, value):
            problems.append(problem)
        given[key] = value
    if problems:
        raise ConfigError(problems)


def _turn(override: str) -> tuple[bool, int]:
    """The algorithm's name goes first, as it decides which settings of the file still apply; sections before keys."""
    key = override.partition("=")[0]
    return key not in ("algorithm", "algorithm.name"), key.count(".")


def _full_key(key: str, value: Any) -> str:
    """The key that a section given in short stands for; the section's other keys stay as they are."""
    if key == "algorithm" and isinstance(value, str):
        return "algorithm.name"
    if key == "rewards" and reward_section(value) is not value:
        return "rewards.train"
    return "hub.repo" if key == "hub" and hub_section(value) is not value else key


def _conflict(key: str, value: Any, given: Mapping[str, Any]) -> str | None:
    """What is wrong where an earlier override has given the same key, alone or in its section."""
    own = {name for name, _ in flatten({key: value})}
    for other, earlier in given.items():
        if key == other or own & {name for name, _ in flatten({other: earlier})}:
            also = "" if key == other else f", also in {other}"
            return f"{key} is given twice{also}; keep one"
    return None


def _write(data: dict[str, Any], key: str, value: Any) -> str | None:
    """Write one value into `data`; what is wrong where its key leads into something that is no section."""
    *path, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(path, 1):
        if depth == 1:
            node |= _written_out({part: node.get(part)})
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            whole = ".".join(path[:depth])
            return f"{key} must be a key of a section, but {whole} is none; set {whole}=... as a whole"
    if key == "algorithm.name" and node.get("name", DEFAULT_ALGORITHM) != value:
        node.clear()  # another algorithm: the file's settings are those of the old one
    node[last] = value
    return None
