"""The whole comparison: search, runs, and what is written of them, also where it is stopped in between."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ngrpo_lora import algorithms, equations
from ngrpo_lora.adapters.header import code_version
from ngrpo_lora.bench.paper import outcomes, report, search
from ngrpo_lora.bench.paper.cost import length
from ngrpo_lora.bench.paper.plan import Job, Plan, main_jobs
from ngrpo_lora.bench.paper.running import Failure, check_folders, run_all, stopping
from ngrpo_lora.config import algorithms as settings
from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.planning.preflight import check_settings
from ngrpo_lora.records.files import written
from ngrpo_lora.records.ownership import owned

__all__ = ["compare", "open_folder"]

MARK = "comparison.json"


def open_folder(folder: Path) -> None:
    """Make the output folder, or make sure that it is one of this command and version.

    Raises:
        ConfigError: it holds something else, or results of another version.
    """
    mark, own = folder / MARK, {"version": code_version(), "algorithms": algorithms_digest()}
    if mark.is_file():
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
            version, made_by = found["version"], found.get("algorithms")
        except (ValueError, TypeError, KeyError):
            version, made_by = f"an unknown one, as {MARK} is damaged", None
        if version != own["version"]:
            raise ConfigError(
                f"--output-dir must hold results of this version ({own['version']}), but {str(folder)!r} has those of "
                f"{version}; give another folder"
            )
        if made_by != own["algorithms"]:
            raise ConfigError(
                f"--output-dir must hold results of these algorithms, but the code of some has changed since "
                f"{str(folder)!r} was begun; give another folder"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"--output-dir must be empty, new, or of an earlier `ngrpo bench paper`, got {str(folder)!r}; give another"
        )
    try:
        with written(mark) as partial:
            partial.write_text(json.dumps(own) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output-dir must be writable, got {str(folder)!r}: {error.strerror}") from None


def algorithms_digest() -> str:
    """SHA-256 of the code that the methods compared are made of, without comments and layout."""
    digest = hashlib.sha256()
    for package in (algorithms, settings, equations):
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()


def compare(plan: Plan, at_once: int, command: Sequence[str], tell: Callable[[str], None]) -> None:
    """Make all runs of a plan that are not complete, and write the report of those that are.

    Args:
        at_once: how many runs at the same time.
        command: what was typed, for the report.
    Raises:
        UserError: a folder does not fit or is in use, the command was stopped, or some runs failed; the report of
            what is complete is written.
    """
    check_runs(plan)
    open_folder(plan.output_dir)
    with owned(plan.output_dir), stopping({}):
        complete(plan, at_once, command, tell)


def check_runs(plan: Plan) -> None:
    """Make sure that runs can begin, and that the budget pays for an iteration of each method.

    Raises:
        ConfigError: the settings that all have in common cannot be trained with, or compute would not be equal.
    """
    jobs = main_jobs(replace(plan, seeds=1), {method.name: method.untuned for method in plan.searched}, length)
    check_settings(jobs[0].config)
    dearest = max(jobs, key=lambda job: job.cost)
    if dearest.cost > plan.budget:
        raise ConfigError(
            f"--budget must pay for an iteration of every method, and one of {dearest.method} costs {dearest.cost:.4g} "
            f"forward passes per sample, got {plan.budget:g}; raise it, or choose methods by --method"
        )


def complete(plan: Plan, at_once: int, command: Sequence[str], tell: Callable[[str], None]) -> None:
    """Do the work of `compare` in a folder that is owned."""
    searched, known = search.jobs(plan, length), search.kept(plan)
    foreseen = main_jobs(plan, {method.name: method.untuned for method in plan.searched} | known, length)
    check_folders(searched)
    announce(plan, searched, foreseen, at_once, tell)
    main: list[Job] = []
    failures: list[Failure] = []
    try:
        while wanted := to_try(searched, known, failures):
            failures += run_all(wanted, at_once, foreseen, plan.output_dir, tell)
            searched = search.jobs(plan, length, [job.name for job, _ in failures])
        winners = search.tuned(plan, searched)
        search.write(plan, searched, winners)
        main = main_jobs(plan, winners, length)
        check_folders(main)
        failures += run_all(main, at_once, [], plan.output_dir, tell)
    finally:
        write_report(plan, searched, main, command, at_once)
    tell(f"results                   {plan.output_dir / 'results.md'}")
    tell(f"the same, with pictures   {plan.output_dir / 'index.html'}")
    if failures:
        raise UserError(in_words(failures, len(searched) + len(main), plan.output_dir))


def to_try(searched: Sequence[Job], known: Collection[str], failures: Sequence[Failure]) -> list[Job]:
    """The search's runs that are still to be made, of methods whose winners are not fixed yet."""
    failed = {job.name for job, _ in failures}
    open_ones = (job for job in searched if job.method not in known and job.name not in failed)
    return [job for job in open_ones if not outcomes.is_complete(job)]


def announce(
    plan: Plan, searched: Sequence[Job], main: Sequence[Job], at_once: int, tell: Callable[[str], None]
) -> None:
    """Print how many runs there will be, how many of them are complete, and how long one is."""
    searching = f"{len(searched)}{' or more' if plan.search else ''} runs of the search"
    done = sum(map(outcomes.is_complete, (*searched, *main)))
    tell(
        f"{len(plan.methods)} methods: {searching} and {len(main)} of the tables, "
        f"{done} of them complete, {at_once} at once, into {plan.output_dir}"
    )
    tell(
        f"  a run of the tables: {plan.budget:g} forward passes per sample, a trained one counted as three, and at "
        f"least {plan.equal_iterations} iterations"
    )


def write_report(
    plan: Plan, searched: Sequence[Job], main: Sequence[Job], command: Sequence[str], at_once: int
) -> None:
    """Write the report of the complete runs that have the settings of the plan; nothing where there is none yet."""
    winners = search.tuned(plan, searched)
    main = main or main_jobs(plan, winners, length)  # of what the search has found when it was stopped
    found = outcomes.read(job for job in main if fits(job))
    tuning = search.write(plan, searched, winners)
    if found:
        report.write(plan, found, tuning, command, len(main), at_once)


def fits(job: Job) -> bool:
    """Whether a run's folder has the settings that are wanted."""
    try:
        check_folders([job])
    except UserError:
        return False
    return True


def in_words(failures: Sequence[Failure], total: int, folder: Path) -> str:
    """What failed, where to read on, and what to do."""
    job, line = failures[0]
    return (
        f"{len(failures)} of {total} runs failed, the first of them {job.name} ({line}); what they printed is in "
        f"{str(folder / 'logs')!r}; the same command tries them again"
    )
