"""`ngrpo doctor`: what is not as it must be on this machine, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def doctor(
    online: Annotated[bool, typer.Option("--online", help="Ask the Hub whether it accepts the token.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the forward pass of the embedded model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All findings as JSON.")] = False,
) -> None:
    """Look at this machine: packages, GPUs, memory, disks, the Hub, ComfyUI; exit status 1 where there is a problem.

    Prints a line for each check, with a remedy where it is not ok, and a block for a bug report, without secrets.
    """
    from ngrpo_lora.planning.doctor.examination import checks, examine, report, system

    findings = []
    for finding in examine(checks(online, quick)):
        findings.append(finding)
        if not as_json:
            typer.echo(finding.line)
    problems = sum(finding.verdict == "problem" for finding in findings)
    if as_json:
        typer.echo(json.dumps({**system(), "problems": problems, "findings": [*map(asdict, findings)]}, indent=1))
    else:
        counted = {0: "no problem", 1: "one problem"}.get(problems, f"{problems} problems")
        typer.echo(f"\n{counted}; for a bug report, paste this:\n\n{report(findings)}")
    if problems:
        raise typer.Exit(1)
