"""`ngrpo bench ...`: measure this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ngrpo_lora.cli.app import Device, RunArguments, asked_device, finite, make_folder, split_arguments
from ngrpo_lora.errors import ConfigError

TunedBy = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="results.json or tuning.json of an earlier comparison: its methods are not searched again.",
        show_default=False,
    ),
]


def overhead(
    arguments: RunArguments = None,
    iterations: Annotated[int, typer.Option(min=1, help="Timed iterations of each variant.")] = 5,
) -> None:
    """What an iteration costs beyond its model, what each speed setting is worth, and what it costs to be left alone.

    First an iteration, in turn with the same forward and backward passes, decodings, rewards and optimizer steps and
    nothing around them. Then the configuration with each setting the other way. Then, each as a share of an iteration:
    checkpoints after every one, records, trackers, the report, the lock, and what keeps rewards to themselves.
    """
    from ngrpo_lora.config import load_config

    config = load_config(*split_arguments(arguments))

    from ngrpo_lora.bench.bare import bare_table
    from ngrpo_lora.bench.keeping import keeping_table
    from ngrpo_lora.bench.training import overhead_table

    bare_table(config, iterations, typer.echo)
    typer.echo("")
    overhead_table(config, iterations, typer.echo)
    typer.echo("")
    keeping_table(config, iterations, typer.echo)


def gpu(
    arguments: RunArguments = None,
    size: Annotated[
        list[int] | None, typer.Option(min=16, help="Height and width, px; repeat for several.", show_default=False)
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Samples per forward pass; repeat for several.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each stage.")] = 3,
) -> None:
    """What a model costs here: time and peak memory by size and batch, with random weights, so nothing is downloaded.

    Sizes are the configuration's, batches 1, 2 and 4, unless given.
    """
    from ngrpo_lora.config import load_config

    config = load_config(*split_arguments(arguments))

    from ngrpo_lora.bench.training import gpu_table

    gpu_table(config, size or [config.model.height_px], batch or [1, 2, 4], repeats, typer.echo)


def solver(
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="Solver steps; repeat for several.", show_default=False)
    ] = None,
    shift: Annotated[
        list[float] | None,
        typer.Option(min=0.01, help="Timestep shift; repeat for several.", show_default=False, callback=finite),
    ] = None,
) -> None:
    """What the solver errs by on a flow whose answer is known, its order, and what integer timesteps cost.

    Steps are 4, 8, 16, ... 1024 and shifts 1 and 3, unless given.
    """
    from ngrpo_lora.bench.solver import solver_table

    solver_table(steps or [2**power for power in range(2, 11)], shift or [1.0, 3.0], typer.echo)


def pipeline(
    widen: Annotated[
        list[int] | None,
        typer.Option(min=1, help="The embedded model's transformer so many times as wide; repeat.", show_default=False),
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(min=16, help="Height and width, px; repeat for several.", show_default=False)
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="Solver steps; repeat for several.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed pictures of each kind.")] = 10,
) -> None:
    """What our diffusers pipeline, and diffusers' own, add to the time that their networks take.

    Widths are 1 and 4, size is 64 px and steps are 8 and 28, unless given.
    """
    from ngrpo_lora.bench.pipeline import overhead_table

    overhead_table(widen or [1, 4], size or [64], steps or [8, 28], repeats, typer.echo)


def gradient(
    arguments: RunArguments = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="Measure each of these values; repeat: every combination.",
            show_default=False,
        ),
    ] = None,
    gradients: Annotated[int, typer.Option(help="Iterations whose gradients are compared, 2 or more.")] = 12,
    prompts: Annotated[int, typer.Option(help="Held-out prompts of the line search, 4 or more.")] = 64,
    step: Annotated[
        list[float] | None,
        typer.Option(help="Length of a step that is tried, in first steps of AdamW; repeat.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file of the rows; where it holds some, the others are measured.", show_default=False),
    ] = None,
) -> None:
    """What the direction of an iteration's update is worth: before long runs, for any configuration.

    Gradients of independent iterations at one adapter, that of lora.init_from or a new one: the share that they have
    in common, and the gain in held-out reward on the way that their mean points. Steps are 0.1, 0.3, 1 and 3, unless
    given.
    """
    from ngrpo_lora.bench.varying import all_settings

    settings = all_settings(*split_arguments(arguments), vary or [])

    from ngrpo_lora.bench.gradient import Asked, gradient_table

    asked = Asked(gradients, prompts, tuple(step)) if step else Asked(gradients, prompts)
    gradient_table(settings, asked, output, typer.echo)


def scaling(
    arguments: RunArguments = None,
    processes: Annotated[
        str, typer.Option(metavar="N,N", help="Also time whole runs on so many processes, such as 1,2.")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Timed iterations of each value.")] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file of times and fits.", show_default=False)] = None,
) -> None:
    """How the time of an iteration grows with group size, solver steps, trained transitions and pixels."""
    from ngrpo_lora.config import load_config
    from ngrpo_lora.errors import ConfigError

    config = load_config(*split_arguments(arguments))
    words = [word.strip() for word in processes.split(",")] if processes else []
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--processes must be numbers with commas between them, got {processes!r}; for example 1,2")

    from ngrpo_lora.bench.scaling import scaling_table

    scaling_table(config, [int(word) for word in words], repeats, output, typer.echo)


def vote(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over the preset demo-vote.", show_default=False),
    ] = None,
    taste: Annotated[str, typer.Option(help="What the voter prefers: warm colours or large objects.")] = "warm",
    wrong: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="Probability of each of its words to be wrong; repeat.",
            show_default=False,
            callback=finite,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each, with the seeds 0, 1, ...")] = 3,
    output_dir: Annotated[Path, typer.Option(help="Where all runs go.")] = Path("runs/bench-vote"),
) -> None:
    """What 150 votes are worth: runs taught by a simulated voter, and the share of held-out pictures to its taste.

    It is wrong in 10% and in 30% of its words, unless given. Ctrl-C stops; the same command continues.
    """
    from ngrpo_lora import registry
    from ngrpo_lora.voting.simulated import TASTES

    if taste not in TASTES:
        known = [*TASTES]
        raise ConfigError(f"--taste must be one of {', '.join(known)}, got {taste!r}{registry.nearest(taste, known)}")

    from ngrpo_lora.bench.voting import vote_table

    vote_table(taste, wrong or [0.1, 0.3], range(seeds), output_dir, settings or [], typer.echo)


def paper(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings laid over what all methods have in common, such as evaluation.num_prompts=480.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look within 20 minutes on two cores: no search, Tables 1 and 3.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="A night: all tables, three seeds.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Training seeds of each row.", show_default=False)] = None,
    table: Annotated[
        list[int] | None,
        typer.Option(
            help="A table of the paper, 1 to 6, or 7 and 8, which are ours; repeat for several.", show_default=False
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A method; repeat for several. Default: all.", show_default=False),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Forward passes per sample of each run, a trained one counted as three: 4800, or 300 with --quick.",
            show_default=False,
        ),
    ] = None,
    tuned_by: TunedBy = None,
    output_dir: Annotated[Path, typer.Option(help="Where all runs and results go.")] = Path("runs/paper"),
    device: Device = "auto",
    at_once: Annotated[
        int | None,
        typer.Option(help="Runs at the same time. Default: one for each core, or for each GPU.", show_default=False),
    ] = None,
) -> None:
    """The paper's comparison: its tables and figures by our own runs of every method at equal compute.

    Ctrl-C stops; the same command continues. What is complete is never made again.
    """
    from ngrpo_lora.bench.paper.plan import make_plan

    if quick and full:
        raise ConfigError("--quick and --full must not be given together; --quick is a first look, --full a night")
    if at_once is not None and at_once < 1:
        raise ConfigError(f"--at-once must be at least 1, got {at_once}; 1 makes one run after the other")
    profile = "quick" if quick else "full" if full else "default"
    asked = (output_dir, profile, budget, seeds, tuple(table or ()), tuple(method or ()), tuple(settings or ()))
    make_plan(*asked, tuned_by=tuned_by)  # what is wrong is said before torch is loaded
    plan = make_plan(*asked, found := asked_device(device), tuned_by)

    from ngrpo_lora.bench.paper.comparison import compare
    from ngrpo_lora.bench.paper.running import places

    compare(plan, at_once or places(found), ["ngrpo", *sys.argv[1:]], typer.echo)


def report(
    output_dir: Annotated[Path, typer.Option(help="Where report.md, report.json and parts/ go.")] = Path(
        "runs/gpu-report"
    ),
    minutes: Annotated[float, typer.Option(help="Budget; what no longer fits is named, not started.")] = 12.0,
    device: Annotated[str, typer.Option(help="auto (prefers a GPU), cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """What this GPU does with FLUX.1-dev's size, random weights, the most valuable part first: time, memory, waiting.

    Iterations by size, quantisation and micro-batch, methods side by side, optimizers, the exported adapter, GPU tests.
    Ctrl-C stops; the same command measures what is not complete. A CPU measures the same on the embedded model.
    """
    if not minutes > 0:
        raise ConfigError(f"--minutes must be more than 0, got {minutes:g}; 12 are enough for most parts on an H100")
    found = asked_device(device)
    if found == "mps":
        raise ConfigError(f"--device must be a CUDA GPU or cpu, got {device!r}, which is mps here; give --device cpu")
    make_folder(output_dir, "--output-dir")

    from ngrpo_lora.bench.gpu.parts import make_parts
    from ngrpo_lora.bench.gpu.running import make_report
    from ngrpo_lora.bench.rows import machine

    complete = make_report(make_parts(found), output_dir, machine(), minutes, typer.echo)
    more = "" if complete else "; some rows are not measured yet: the same command goes on with them"
    typer.echo(f"{output_dir / 'report.md'}{more}")
