"""Says where a module or name of this package is now, when a user's file imports it from where it once was."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["stale_imports"]

PACKAGE = Path(__file__).parent


def stale_imports(source: str) -> list[str]:
    """Describe every import of a Python source that this package no longer answers, each with its new place.

    Returns:
        Lines such as `ngrpo_lora.noise.neighbor_noise is ngrpo_lora.equations.noise.neighbor_noise now`.
    """
    found: list[str] = []
    for module, name in _imports(source):
        if not _answers(module, name):
            place = _place_of(module, name)
            old = f"{module}.{name}" if name else module
            found.append(f"{old} is {place} now" if place else f"{old} is gone")
    return list(dict.fromkeys(found))


def _imports(source: str) -> Iterator[tuple[str, str]]:
    """Modules of this package that a source imports, each with a name that it takes from it, or with none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("ngrpo_lora."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ngrpo_lora":
            yield from ((node.module or "", alias.name) for alias in node.names)


def _answers(module: str, name: str) -> bool:
    known = _names()
    return module in known and (not name or name == "*" or name in known[module].bound or f"{module}.{name}" in known)


def _place_of(module: str, name: str) -> str | None:
    """The most alike of the places that define a name, or of the modules, where it is a module that is asked for."""
    places = [other for other, names in _names().items() if name and name in names.defined]
    wanted = module
    if not places:
        wanted, places, name = f"{module}.{name}".rstrip("."), [*_names()], ""
    stems = {place: place.rpartition(".")[2].lstrip("_") for place in places}
    stem = wanted.rpartition(".")[2]

    def likeness(place: str) -> tuple[float, float]:
        of_stem = difflib.SequenceMatcher(None, stem, stems[place]).ratio()
        return of_stem, difflib.SequenceMatcher(None, wanted, place).ratio()

    best = max(places, key=likeness)
    if not name and likeness(best)[0] < 0.8:
        return None
    return f"{best}.{name}" if name else best


class _Names(NamedTuple):
    """Names at the top level of a module: those that it defines, and all, with those that it imports."""

    defined: set[str]
    bound: set[str]


@cache
def _names() -> dict[str, _Names]:
    """Names of every module of this package, which are read and not imported."""
    known = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        known[module] = _names_of(ast.parse(path.read_text(encoding="utf-8")))
    return known


def _names_of(tree: ast.Module) -> _Names:
    defined: set[str] = set()
    imported: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.If):  # TYPE_CHECKING, of names that load when they are used
            inner = _names_of(ast.Module(node.body, []))
            imported |= inner.bound
    return _Names(defined, defined | imported)
