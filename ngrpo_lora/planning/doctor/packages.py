"""Python and the packages: whether they are there, new enough, import, and are those that were tested together."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from ngrpo_lora.errors import first_line
from ngrpo_lora.planning.doctor.findings import Finding

__all__ = ["KNOWN_GOOD", "package", "python", "this_package"]

KNOWN_GOOD = {
    "torch": "2.13.0",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "huggingface_hub": "2.4.0",
    "safetensors": "0.8.0",
    "bitsandbytes": "0.50.2",
}
"""The versions of requirements.lock, with which the tests run."""

OPTIONAL = ("bitsandbytes",)
MIN_PYTHON = (3, 11)


def python() -> Iterator[Finding]:
    """Whether Python is new enough."""
    found, least = (".".join(map(str, numbers)) for numbers in (sys.version_info[:3], MIN_PYTHON))
    if sys.version_info[:2] < MIN_PYTHON:
        yield Finding("Python", "problem", f"{found} is older than {least}", f"make an environment with {least}")
    else:
        yield Finding("Python", "ok", found)


def this_package() -> Iterator[Finding]:
    """The version of ngrpo-lora, which a clone that was never installed does not have."""
    try:
        yield Finding("ngrpo-lora", "ok", version("ngrpo-lora"))
    except PackageNotFoundError:
        text = "runs from a folder without being installed, so that the least versions of packages are not known"
        yield Finding("ngrpo-lora", "note", text, "pip install -e FOLDER")


def package(name: str) -> Iterator[Finding]:
    """Whether a package is there, imports, and has a version that is known to work."""
    try:
        found = version(name)
    except PackageNotFoundError:
        if name in OPTIONAL:
            text = "not installed; 8-bit optimizers and bases in nf4 or int8 need it"
            yield Finding(name, "note", text, f"pip install {name}")
        else:
            yield Finding(name, "problem", "not installed", f"pip install {name}=={KNOWN_GOOD[name]}")
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except (Exception, SystemExit) as error:
        cause = root_cause(error)
        text = f"{found} is installed but does not import: {type(cause).__name__}: {first_line(cause)}"
        again = f"pip install --force-reinstall {name}=={KNOWN_GOOD[name]}"
        yield Finding(name, "problem", text, again if cause is error else "reinstall what this names, then try again")
        return
    yield judged(name, found)


def root_cause(error: BaseException) -> BaseException:
    """The error that others were raised from: transformers, which loads lazily, says only that it could not import."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def judged(name: str, found: str) -> Finding:
    """The verdict on a version: below the least one, other than the known good one, or just that."""
    from packaging.version import Version

    good, least = KNOWN_GOOD[name], minimum(name)
    if least is not None and Version(found) < Version(least):
        return Finding(name, "problem", f"{found} is older than {least}", f"pip install {name}=={good}")
    if Version(found).public != good:
        return Finding(name, "note", f"{found}, tested is {good}", f"where it fails, pip install {name}=={good}")
    return Finding(name, "ok", found)


def minimum(name: str) -> str | None:
    """The least version by this package's own metadata; None where it has none."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        needed = [Requirement(text) for text in requires("ngrpo-lora") or ()]
    except PackageNotFoundError:
        return None
    bounds = [
        bound.version
        for requirement in needed
        if canonicalize_name(requirement.name) == canonicalize_name(name)
        for bound in requirement.specifier
        if bound.operator == ">="
    ]
    return next(iter(bounds), None)
