"""Name -> module or function: the file name is the registry, nothing is listed twice.

A new algorithm, model family or reward is one new file; its imports load when it is chosen, and a missing
dependency keeps its own error.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ngrpo_lora.errors import ConfigError

__all__ = [
    "ALGORITHMS",
    "ALGORITHM_SETTINGS",
    "MODELS",
    "REWARDS",
    "REWARD_SETTINGS",
    "allow_modules",
    "check_function",
    "check_name",
    "check_reference",
    "defines",
    "docstring",
    "load",
    "names",
    "nearest",
    "resolve_function",
    "source_digest",
    "split_reference",
]

ALGORITHMS, MODELS, REWARDS = "ngrpo_lora.algorithms", "ngrpo_lora.models", "ngrpo_lora.rewards"
ALGORITHM_SETTINGS, REWARD_SETTINGS = "ngrpo_lora.config.algorithms", "ngrpo_lora.config.rewards"
"""Packages whose modules are chosen by name. Rooms below them name them here as text, and so import none of them."""

allow_modules = True
"""Whether names may be module paths, which are imported. False where names come from strangers, as in ComfyUI."""


def names(package: str) -> list[str]:
    """Names that `load` accepts for `package`: its modules without a leading underscore, none of them imported."""
    return sorted(m.name for m in pkgutil.iter_modules(map(str, _folders(package))) if m.name[0] != "_")


def nearest(name: str, choices: Sequence[str]) -> str:
    """`; did you mean X?` where a choice resembles `name`, else an empty string."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def check_name(package: str, name: str) -> None:
    """Raise ConfigError unless `name` is a module of `package`; dotted names are left to the import, if allowed."""
    if "." in name and allow_modules:
        return
    known = names(package)
    if name not in known:
        kind = package.rpartition(".")[2]
        raise ConfigError(f"must be one of {', '.join(known)} (a file in {kind}/), got {name!r}{nearest(name, known)}")


def load(package: str, name: str) -> ModuleType:
    """Import the module `name`: a file in `package`, or a dotted module path elsewhere.

    Raises:
        ConfigError: no such file or module; the message lists the names and the nearest one.
        ImportError: the module exists and one of its own imports fails.
    """
    check_name(package, name)
    if "." not in name:
        return importlib.import_module(f"{package}.{name}")
    if not _is_there(name):
        raise ConfigError(f"names the module {name!r}, which Python cannot find; install it or correct the name")
    with _naming_what_moved(name):
        return importlib.import_module(name)


def docstring(package: str, name: str) -> str:
    """The docstring of the file `name` of `package`, which is read and not imported."""
    return ast.get_docstring(_source(package, name)) or ""


def defines(package: str, name: str, what: str) -> bool:
    """Whether the file `name` of `package` defines or imports `what` at its top level; it is read and not imported."""
    bound: set[str] = set()
    for node in _source(package, name).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            bound |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return what in bound


def _source(package: str, name: str) -> ast.Module:
    (path,) = (folder / f"{name}.py" for folder in _folders(package) if (folder / f"{name}.py").is_file())
    return ast.parse(path.read_text(encoding="utf-8"))


def _folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return [Path(folder) for folder in spec.submodule_search_locations or ()]


def split_reference(reference: str) -> tuple[str, str]:
    """Split `package.module:function` or `file.py:function` in two; the file may be on a drive of Windows."""
    target, _, function = reference.rpartition(":")
    return target, function


def check_reference(reference: str) -> None:
    """Raise ConfigError unless `reference` has the form of a function's; nothing is looked for."""
    target, function = split_reference(reference)
    if not target or not function.isidentifier():
        raise ConfigError(f"must look like package.module:function or file.py:function, got {reference!r}")


def check_function(reference: str) -> None:
    """Raise ConfigError when `reference` cannot lead to a function; imports no more than parent packages."""
    check_reference(reference)
    target, _ = split_reference(reference)
    if target.endswith(".py"):
        if not Path(target).is_file():
            raise ConfigError(f"names the file {target!r}, which does not exist here; write file.py:function")
        return
    if not _is_there(target):
        raise ConfigError(f"names the module {target!r}, which Python cannot find; install it or correct the name")


def _is_there(module: str) -> bool:
    """Whether Python can find a module; its parent packages are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def resolve_function(reference: str) -> Callable[..., Any]:
    """Import the function behind `package.module:function` or `file.py:function`.

    Raises:
        ConfigError: malformed, no such file or module, it fails at its import, no such function (the nearest one is
            named).
    """
    check_function(reference)
    target, function = split_reference(reference)

    from ngrpo_lora.guests.files import failure, import_guest  # which load torch

    try:
        with _naming_what_moved(target):
            module = import_guest(target)
    except ImportError as error:
        raise failure(target, error) from error
    found = vars(module).get(function)
    if not callable(found):
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(f"names no function of {target}, got {function!r}{nearest(function, public)}")
    return found


@contextmanager
def _naming_what_moved(target: str) -> Iterator[None]:
    """Turn an ImportError of a user's file that imports old places of this package into a message with the new ones.

    Raises:
        ConfigError: such imports are in the file or module `target`.
    """
    try:
        yield
    except ImportError as error:
        from ngrpo_lora.moved import stale_imports

        path = _source_path(target)
        stale = stale_imports(path.read_text(encoding="utf-8")) if path is not None else []
        if not stale:
            raise
        raise ConfigError(f"{target!r} imports what has moved: {'; '.join(stale)}; change these imports") from error


def _source_path(target: str) -> Path | None:
    """The source of a file or of an importable module; None where it has none."""
    if target.endswith(".py"):
        return Path(target)
    spec = importlib.util.find_spec(target)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def source_digest(reference: str) -> str:
    """SHA-256 of the file that holds the function behind `package.module:function` or `file.py:function`."""
    path = _source_path(split_reference(reference)[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None else ""
