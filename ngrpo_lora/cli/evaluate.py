"""`ngrpo score`, `compare`, `curves` and `report`: is it better?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ngrpo_lora.cli.app import Device, Rewards, asked_device, make_folder, model_name
from ngrpo_lora.errors import ConfigError

HeldOut = Annotated[
    str | None,
    typer.Option(
        help="Prompts, in the form of prompts.held_out; default: world:held_out, of embedded-edit edits:held_out.",
        show_default=False,
    ),
]


def score(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...",
            help="Pictures (videos as GIF, animated PNG or WebP), folders of them; or runs.",
            show_default=False,
        ),
    ],
    reward: Rewards = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What every picture should show; default: NAME.txt beside it, its line of metadata.jsonl "
            '({"file_name": ..., "prompt": ...}), or what `ngrpo sample` wrote into it.',
        ),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(metavar="ROWSxCOLUMNS", help="Every file is a grid of so many pictures.")
    ] = None,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder for tables and the contact sheet; made when missing.")] = Path(
        "scores"
    ),
) -> None:
    """Score pictures, best first on a contact sheet; or, of runs, the last evaluation against the first."""
    if grid is not None and re.fullmatch(r"[1-9]\d*x[1-9]\d*", grid) is None:
        raise ConfigError(f"--grid must be ROWSxCOLUMNS, for example 4x3, got {grid!r}")
    runs = [source for source in sources if (source / "metrics.jsonl").is_file()]
    if runs and (len(runs) < len(sources) or reward):
        raise ConfigError(
            f"SOURCE must be pictures, or runs without --reward (their scores are there), got the run {str(runs[0])!r} "
            f"with {'--reward' if reward else 'pictures'}; score them apart"
        )
    if not runs and not reward:
        raise ConfigError("--reward must be given to score pictures; `ngrpo rewards` lists them")

    if runs:
        from ngrpo_lora.evaluation.runs import compare_evaluations, measures_table
        from ngrpo_lora.evaluation.statistics import differences_table

        make_folder(output)
        differences = [d for run in runs for d in compare_evaluations(run, output)]
        typer.echo(differences_table(differences))
        if measured := measures_table(runs):
            typer.echo(f"\n{measured}")
    else:
        from ngrpo_lora.evaluation import judging
        from ngrpo_lora.records.pictures import collect

        configs = judging.parse_rewards(reward or [])
        rows, _, columns = (grid or "").partition("x")
        pictures = collect(sources, prompt, (int(rows), int(columns)) if grid else None)
        place = asked_device(device)
        make_folder(output)
        typer.echo(judging.score_pictures(pictures, configs, output, place))
    typer.echo(f"\ntables and pictures: {output}")


def compare(
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ADAPTER...", help="LoRA files, folders of runs, or owner/name of the Hub.", show_default=False
        ),
    ] = None,
    reward: Rewards = None,
    base: Annotated[bool, typer.Option(help="Compare with the base model; --no-base: with the first ADAPTER.")] = True,
    prompts: HeldOut = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Different prompts, at most.")] = 48,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 2,
    seed: Annotated[
        int, typer.Option(min=0, help="Which prompts, and the seed of the first picture; the rest follow it.")
    ] = 1000,
    model: Annotated[
        str | None,
        typer.Option(
            help="embedded, a diffusers folder or a Hub id; default: the model that the adapters name.",
            callback=model_name,
        ),
    ] = None,
    device: Device = "auto",
    output: Annotated[
        Path, typer.Option(help="Folder for pictures, tables and pages; pictures that are there are not drawn again.")
    ] = Path("comparison"),
    votes: Annotated[
        list[Path] | None,
        typer.Option(help="Votes that blind.html saved: count them, and do nothing else.", show_default=False),
    ] = None,
) -> None:
    """Compare adapters with their base on the same prompts and seeds, by rewards and by your own eyes."""
    if not votes and not (adapters and reward):
        raise ConfigError("ADAPTER and --reward must be given, for example ngrpo compare runs/demo --reward world")

    from ngrpo_lora.adapters.finding import find_adapter

    files = [find_adapter(adapter, "ADAPTER") for adapter in adapters or []]

    if votes:
        from ngrpo_lora.evaluation.votes import read_votes, votes_table

        typer.echo(votes_table(read_votes(votes)))
        return

    from ngrpo_lora.evaluation import comparison, judging, statistics

    configs = judging.parse_rewards(reward or [])
    drawn = comparison.distinct_prompts(prompts, num_prompts, seed) if prompts else []
    place = asked_device(device)
    baseline, candidates = comparison.open_candidates(files, model, base, place)
    drawn = drawn or comparison.distinct_prompts(comparison.held_out(baseline), num_prompts, seed)
    baseline, *candidates = comparison.suiting(drawn, [baseline, *candidates])
    make_folder(output)
    differences = comparison.compare_adapters(baseline, candidates, drawn, seeds, seed, configs, output, place)
    typer.echo(statistics.differences_table(differences))
    typer.echo(f"\nside by side: {output / 'side_by_side.html'}\nblind vote:   {output / 'blind.html'}")


def curves(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs.", show_default=False)],
    output: Annotated[Path, typer.Option(help="PNG file for the curves.")] = Path("curves.png"),
) -> None:
    """Curves of runs: held-out figures before and after as a Markdown table, and their curves as a picture."""
    _check_runs(runs)

    from ngrpo_lora.reports.curves import write_comparison
    from ngrpo_lora.reports.tables import comparison_table

    typer.echo(comparison_table(runs))
    typer.echo(f"\ncurves: {write_comparison(runs, output)}")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file; default: report.html in RUN, and of several in this folder.", show_default=False),
    ] = None,
) -> None:
    """Write the report of a run anew, or one page that compares several: curves, pictures, warnings, settings."""
    _check_runs(runs)
    path = output or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if path.is_dir():
        raise ConfigError(f"--output must be a file, for example report.html, but {str(path)!r} is a folder")
    make_folder(path.parent)

    from ngrpo_lora.config import load_config
    from ngrpo_lora.evaluation.report.page import write_report
    from ngrpo_lora.evaluation.report.record import Record
    from ngrpo_lora.records.ownership import owner

    records = [Record.read(run, load_config(run / "config.yaml"), is_running=owner(run) is not None) for run in runs]
    typer.echo(f"report: {write_report(records, path)}")


def _check_runs(runs: list[Path]) -> None:
    """Refuse folders that are no runs, and runs without a first evaluation."""
    from ngrpo_lora.records.metrics import read_metrics

    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise ConfigError(f"RUN must be the output folder of a run, but {str(run)!r} holds no metrics.jsonl")
        if not read_metrics(run / "metrics.jsonl"):
            raise ConfigError(f"RUN must have finished its first evaluation, but {str(run)!r} has no metrics yet")
