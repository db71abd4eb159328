"""What a run would do, without doing it: `ngrpo config`, `plan`, `presets`, `rewards`, `prompts`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ngrpo_lora.cli.app import RunArguments, finite, model_name, print_options, print_table, split_arguments
from ngrpo_lora.errors import ConfigError


def inspect(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="As in prompts.train, such as mine.txt or hpdv2:test.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Count tokens and check source pictures for it: embedded, a diffusers folder or a Hub id.",
            callback=model_name,
        ),
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="Divide as prompts.held_out would.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The run's seed, for the order.")] = 0,
    show: Annotated[int, typer.Option(min=0, help="How many prompts to show.")] = 8,
) -> None:
    """Count prompts, their duplicates, lengths and tokens, and show the first ones that training would draw."""
    from ngrpo_lora.planning.inspection import inspect_sources

    print_table(inspect_sources(sources, model, held_out, seed, show))


def config(
    arguments: RunArguments = None,
    describe: Annotated[bool, typer.Option("--describe", help="List all keys with type, default and meaning.")] = False,
) -> None:
    """Check a configuration and print it in full, as YAML."""
    from ngrpo_lora.config import describe as options
    from ngrpo_lora.config import dump_config, load_config

    resolved = load_config(*split_arguments(arguments))
    if describe:
        print_options(options({"algorithm": resolved.algorithm.name}))
    else:
        typer.echo(dump_config(resolved), nl=False)


def plan(
    arguments: RunArguments = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            min=1, max=1e6, callback=finite, help="GiB of each GPU, by its name: exit status 1 where it is not enough."
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="GPUs, each with a process of its own; default: trainer.planned_gpus.", show_default=False
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1e9, callback=finite, help="Sustained TFLOP/s of a GPU, for an estimate of the time."
        ),
    ] = None,
    measured_s_per_forward: Annotated[
        float | None,
        typer.Option(
            min=1e-6, max=1e9, callback=finite, help="Seconds of one forward pass for one sample, in place of --tflops."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON: bytes, FLOPs, counts.")] = False,
) -> None:
    """Say what a run will need, before any weights are loaded: memory by stage, function evaluations, FLOPs."""
    if tflops is not None and measured_s_per_forward is not None:
        raise ConfigError("--tflops and --measured-s-per-forward are two ways to say the same; give one of them")

    from ngrpo_lora.config import load_config

    resolved = load_config(*split_arguments(arguments))

    from ngrpo_lora.planning import report
    from ngrpo_lora.planning.plan import GIB, make_plan
    from ngrpo_lora.planning.preflight import check_functions

    check_functions(resolved)
    gpus = gpus or resolved.trainer.planned_gpus
    figures = make_plan(resolved, gpus)
    limit = None if gpu_memory is None else gpu_memory * GIB
    fits = limit is None or figures.fits(limit)
    advice = None if limit is None or fits else report.suggest(resolved, limit, gpus)
    if as_json:
        typer.echo(json.dumps(report.plan_values(figures, limit, advice), indent=1))
    else:
        print_table(report.plan_table(figures))
        typer.echo()
        for line in report.plan_lines(figures, tflops, measured_s_per_forward):
            typer.echo(line)
        typer.echo(report.verdict(figures, limit, advice))
    if not fits:
        raise typer.Exit(1)


def presets() -> None:
    """List the presets: model, what they need by `ngrpo plan`, and whether that has been measured."""
    from ngrpo_lora.config.presets import describe_presets

    print_table(describe_presets())


def rewards(
    name: Annotated[
        str | None, typer.Argument(help="A reward, to read about it and its settings.", show_default=False)
    ] = None,
) -> None:
    """List the rewards, or say all about one: its source, range and licence, and its settings."""
    from ngrpo_lora.registry import REWARDS as package
    from ngrpo_lora.registry import check_name, docstring, names

    if name is None:
        width = max(map(len, names(package)))
        for known in names(package):
            typer.echo(f"{known:<{width}}  {docstring(package, known).splitlines()[0]}")
        typer.echo("\n`ngrpo rewards NAME` says more; any function is a reward too: rewards=file.py:function")
        return
    check_name(package, name)

    from ngrpo_lora.config import describe_reward

    typer.echo(f"{docstring(package, name)}\n")
    print_options(describe_reward(name))
