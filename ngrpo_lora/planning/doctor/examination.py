"""All checks in their order, and what they come to in a bug report."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ngrpo_lora.errors import first_line
from ngrpo_lora.planning.doctor import hardware, packages, surroundings, trials
from ngrpo_lora.planning.doctor.findings import Finding, scrub

__all__ = ["Check", "checks", "examine", "report", "system"]


class Check(NamedTuple):
    """One thing to look at, and the packages that must import before it can be."""

    name: str
    look: Callable[[], Iterator[Finding]]
    needs: tuple[str, ...] = ()


def checks(online: bool = False, quick: bool = False) -> list[Check]:
    """All checks; `online` lets one ask the Hub, `quick` leaves the embedded model out."""
    last = [] if quick else [Check("embedded model", trials.embedded_model, ("torch", "diffusers", "transformers"))]
    return [
        Check("Python", packages.python),
        Check("ngrpo-lora", packages.this_package),
        *(Check(name, partial(packages.package, name)) for name in packages.KNOWN_GOOD),
        Check("CUDA", hardware.cuda, ("torch",)),
        Check("GPU", hardware.gpus, ("torch",)),
        Check("CPU", hardware.processor, ("torch",)),
        Check("memory", hardware.memory),
        Check("disk, here", hardware.disk),
        Check("disk, Hub cache", hardware.hub_cache, ("huggingface_hub",)),
        Check("Hub", partial(surroundings.hub, online), ("huggingface_hub",)),
        Check("ComfyUI", surroundings.comfyui),
        Check("launcher", surroundings.launcher),
        Check("8-bit", trials.eight_bit, ("torch", "bitsandbytes")),
        *last,
    ]


def examine(all_checks: Sequence[Check]) -> Iterator[Finding]:
    """Do the checks one after the other; one that fails by itself is a problem of its own, and the next one follows."""
    for check in all_checks:
        if absent := [name for name in check.needs if name not in sys.modules]:  # their own checks import them
            text = f"not looked at without {' and '.join(absent)}"
            yield Finding(check.name, "note", text, "see the lines above")
            continue
        found: list[Finding] = []
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what packages print must not come between the findings
                found.extend(check.look())
        except (Exception, SystemExit) as error:
            text = f"the check itself failed: {type(error).__name__}: {first_line(error)}"
            found.append(Finding(check.name, "problem", text, "report it"))
        yield from (finding.scrubbed() for finding in found)


def system() -> dict[str, str]:
    """What is examined: versions of this package and of Python, and the operating system."""
    try:
        own = version("ngrpo-lora")
    except PackageNotFoundError:
        own = "not installed"
    return {"ngrpo_lora": own, "python": platform.python_version(), "platform": scrub(platform.platform())}


def report(findings: Sequence[Finding]) -> str:
    """A block to paste into a bug report."""
    about = system()
    head = f"ngrpo-lora {about['ngrpo_lora']}, Python {about['python']}, {about['platform']}"
    marks = {"ok": "", "note": " [note]", "problem": " [problem]"}
    lines = [f"{finding.check}: {finding.text}{marks[finding.verdict]}" for finding in findings]
    return "\n".join(["```", head, *lines, "```"])
