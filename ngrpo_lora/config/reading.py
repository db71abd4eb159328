"""Reads a RunConfig from presets, YAML files and `key=value` overrides, and writes one as YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ngrpo_lora import registry
from ngrpo_lora.config.plugins import DEFAULT_ALGORITHM, RewardConfig, reward_section
from ngrpo_lora.config.problems import problems_in_words
from ngrpo_lora.config.run import RunConfig, hub_section
from ngrpo_lora.errors import ConfigError

__all__ = [
    "changed_keys",
    "dump_config",
    "flatten",
    "load_config",
    "parse_config",
    "parse_reward_entries",
    "parse_settings",
    "preset_names",
]


PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "demo"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 reads a string) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


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
        overrides: `section.key=value`, the value in YAML; later stages win: defaults, file, overrides. A file that
            `extends` a preset or another file (by its path beside the first) has precedence over that.

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
        found = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"settings must be lines of key=value, or YAML; the text {_yaml_problem(error)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"settings must be lines of key=value, or YAML's key: value, got {text!r}")
    return found


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
    path = Path(config)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        what = "is a folder" if path.is_dir() else "does not exist"
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
    found = _find(path.parent / base if (path.parent / base).is_file() else base)
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
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be UTF-8 text, but byte {error.start} is not; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} {_yaml_problem(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got {data!r}")
    return data


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"is not valid YAML: {error.problem} at line {mark.line + 1}, column {mark.column + 1}"
    return f"is not valid YAML: {' '.join(str(error).split())}"


def _apply(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write `key=value` overrides into `data`."""
    problems: list[str] = []
    seen: set[str] = set()
    # The algorithm's name goes first: it decides which settings of the file still apply.
    for override in sorted(overrides, key=lambda text: text.partition("=")[0] not in ("algorithm", "algorithm.name")):
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            problems.append(f"an override must look like key=value, got {override!r}; for example rollout.num_steps=8")
            continue
        if key in seen:
            problems.append(f"{key} is given twice; keep one")
            continue
        seen.add(key)
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            what = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
            problems.append(f"{key} must be a YAML value, got {text!r} ({what}); put text in quotes")
            continue
        if len(parts) == 1 and parts[0] == "algorithm" and isinstance(value, str):
            parts, key = ["algorithm", "name"], "algorithm.name"
        *path, last = parts
        node: Any = data
        for depth, part in enumerate(path, 1):
            if isinstance(node.get(part), str) and part == "algorithm":
                node[part] = {"name": node[part]}
            if depth == 1 and part == "rewards" and node.get(part) is not None:
                node[part] = reward_section(node[part])
            if depth == 1 and part == "hub":
                node[part] = hub_section(node.get(part))
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                whole = ".".join(path[:depth])
                problems.append(f"{key} must be a key of a section, but {whole} is none; set {whole}=... as a whole")
                break
        else:
            if key == "algorithm.name" and node.get("name", DEFAULT_ALGORITHM) != value:
                node.clear()  # another algorithm: the file's settings are those of the old one
            node[last] = value
    if problems:
        raise ConfigError(problems)
