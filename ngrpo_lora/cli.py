"""The `ngrpo` command. Heavy imports are inside the commands, so that `--help` and configuration errors are fast."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ngrpo_lora.errors import ConfigError, SharedError, UserError

if TYPE_CHECKING:
    from ngrpo_lora.config import Option, RunConfig

__all__ = ["app"]


class _Group(TyperGroup):
    """Shows a UserError as its message alone, with exit status 2; every other error keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if not isinstance(error, SharedError) or os.environ.get("RANK", "0") == "0":
                typer.echo(f"ngrpo: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    help="Tune flow-matching image models on rewards with Neighbor GRPO and LoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file or a preset (default: demo), then settings such as rollout.num_steps=8. "
        "`ngrpo config --describe` lists all keys.",
        show_default=False,
    ),
]


def _split(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """The first word is the config when it has no `=`; all others are overrides."""
    words = arguments or []
    return (words[0], words[1:]) if words and "=" not in words[0] else (None, words)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ngrpo-lora {version('ngrpo-lora')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Tune flow-matching image models on rewards with Neighbor GRPO and LoRA."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("ngrpo_lora").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that no command here needs


@app.command()
def train(
    arguments: RunArguments = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on this machine; default: one for each GPU, trainer.cpu_processes on a CPU.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a LoRA: `ngrpo train` for the embedded demo, `ngrpo train run.yaml trainer.num_iterations=100`.

    All GPUs of this machine take part. For several machines start it with `torchrun ... -m ngrpo_lora train ...`.
    """
    from ngrpo_lora.config import load_config
    from ngrpo_lora.preflight import check_run

    config = load_config(*_split(arguments))

    from ngrpo_lora import distributed

    if distributed.launched():
        processes = distributed.Processes(config.trainer.timeout_s)
        if problem := processes.agree(_problem(check_run, config) if processes.is_main else None):
            raise SharedError(problem)
        _train(config)
        return
    check_run(config)
    count = distributed.process_count(config.model.device, num_processes, config.trainer.cpu_processes)
    _warn_of_shortage(config, count)
    if count == 1:
        _train(config)
    elif status := distributed.launch(count, [sys.executable, "-m", "ngrpo_lora", "train", *(arguments or [])]):
        raise typer.Exit(status if status > 0 else 1)


def _warn_of_shortage(config: RunConfig, gpus: int) -> None:
    """Say before anything large is downloaded that the GPU is too small, and what would make the run fit."""
    import torch

    if not (torch.cuda.is_available() and config.model.device.startswith(("auto", "cuda"))):
        return
    from ngrpo_lora import devices
    from ngrpo_lora.plan_report import shortage

    try:
        text = shortage(config, devices.free_memory(), gpus)
    except (UserError, subprocess.CalledProcessError):  # a model or a GPU that cannot be used says so when it is
        return
    if text is not None:
        typer.echo(f"ngrpo: {text}", err=True)


def _train(config: RunConfig) -> None:
    from ngrpo_lora import trainer

    trainer.train(config)


def _problem(check: Callable[[RunConfig], None], config: RunConfig) -> str | None:
    """The message of a check that fails."""
    try:
        check(config)
    except UserError as error:
        return str(error)
    return None


@app.command()
def sample(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What to draw; repeat for several prompts.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="More of them: a source as in prompts.train, such as mine.txt or hpdv2:test.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many to take of --prompts.")] = 24,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:STRENGTH]",
            help="LoRA file of any trainer, the folder of a run, or owner/name of the Hub; repeated, they draw "
            "together. Without it the base model draws.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the first image of every prompt; default: 0.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images per prompt, with seeds SEED, SEED + 1, ...")] = 1,
    strength: Annotated[
        float | None, typer.Option(help="Of adapters that have none beside their name; 1 is as trained, 0 the base.")
    ] = None,
    base_too: Annotated[bool, typer.Option("--base-too", help="Draw everything with the base model too.")] = False,
    grid: Annotated[
        bool, typer.Option("--grid", help="Each adapter draws alone: grid.png has prompts by adapters.")
    ] = False,
    like: Annotated[
        Path | None,
        typer.Option(help="A picture that this command drew: draw it again, with what else is given changed."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="embedded, a diffusers folder or a Hub id; default: the model that the adapter names."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default: the first adapter's, as all below.")] = None,
    shift: Annotated[float | None, typer.Option(help="Timestep shift.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    solver: Annotated[str | None, typer.Option(help="dpmpp_2m or euler.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the PNG files; made when missing.")] = Path("samples"),
) -> None:
    """Draw images, or videos as animated PNG; the same prompt and seed give the same pixels, whatever else is drawn.

    Every file says how it was drawn, so that --like can draw it again.
    """
    if not all(text.strip() for text in prompt or []):
        raise ConfigError("--prompt must not be empty; say what to draw, for example --prompt 'a red star'")
    if not (prompt or prompts or like):
        raise ConfigError("--prompt, --prompts or --like must be given, for example --prompt 'a red star'")

    from ngrpo_lora.adapter_file import find_adapter, finite_strength, parse_weighted

    chosen = [parse_weighted(text, 1.0 if strength is None else strength) for text in adapter or []]
    adapters = [(find_adapter(path, "--adapter"), factor) for path, factor in chosen]
    _make_folder(output)

    from ngrpo_lora import sampling
    from ngrpo_lora.pictures import save_png

    texts = [*(prompt or []), *(sampling.listed_prompts(prompts, num_prompts) if prompts else [])]
    info = sampling.drawing_settings(adapters[0][0] if adapters else None, model)
    if like is not None:
        recipe = sampling.read_recipe(like, same_adapters=not adapters)
        info = sampling.on_this_machine(recipe.info, model)
        texts, seed = texts or [recipe.prompt], recipe.seed if seed is None else seed
        again = [(str(path), own if strength is None else strength) for path, own in recipe.adapters]
        adapters = adapters or [(Path(path), finite_strength(path, factor)) for path, factor in again]
    options = {"steps": steps, "shift": shift, "guidance": guidance, "solver": solver, "height": height, "width": width}
    info = sampling.with_settings(info, options)
    columns = sampling.columns_of(adapters, grid, base_too)
    seeds = range(seed or 0, (seed or 0) + num_images)
    cells, captions = [], []
    for drawing in sampling.draw_columns(info, columns, texts, seeds):
        slug = re.sub(r"[^a-z0-9]+", "-", drawing.prompt.lower()).strip("-")[:60] or "prompt"
        label = f"-{drawing.column.label}" if len(columns) > 1 else ""
        path = output / f"{drawing.row:03d}-{slug}-seed{drawing.seed}{label}.png"
        save_png(path, drawing.frames[0], drawing.text, drawing.frames[1:])
        typer.echo(path)
        cells.append(drawing.frames[len(drawing.frames) // 2])
        captions.append(f"{drawing.column.label}, seed {drawing.seed}\n{drawing.prompt}")
    if grid:
        from ngrpo_lora.report import save_grid

        save_grid(output / "grid.png", cells, captions, len(columns), caption_lines=3)
        typer.echo(output / "grid.png")


@app.command()
def info(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="LoRA files of any trainer, runs, or owner/name of the Hub.", show_default=False
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON list.")] = False,
) -> None:
    """Say what LoRA files are and want: trainer, base, ranks, alpha, layers, effect, and how to draw with them."""
    from ngrpo_lora.adapter_report import describe, lines

    said = [describe(file) for file in files]
    if as_json:
        typer.echo(json.dumps(said, indent=1))
        return

    from rich.table import Table
    from rich.text import Text

    for one in said:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in lines(one):
            table.add_row(Text(name, style="bold"), Text(value))
        _show(table)
        typer.echo()


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A LoRA file of any trainer, a run, or owner/name of the Hub.")
    ],
    form: Annotated[str, typer.Option("--format", help="diffusers, comfyui or kohya.")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The file to write; default: NAME-FORMAT.safetensors beside the adapter, of the Hub's ones here."
        ),
    ] = None,
) -> None:
    """Write an adapter in another format, with its alpha folded in."""
    if form not in ("diffusers", "comfyui", "kohya"):
        raise ConfigError(f"--format must be diffusers, comfyui or kohya, got {form!r}")

    from ngrpo_lora.adapter_file import adapter_label, convert, find_adapter, read_adapter_file, save_tensors

    file = read_adapter_file(find_adapter(source, "FILE"))
    beside = file.path.with_stem(f"{file.path.stem}-{form}")
    target = output or (beside if Path(source).exists() else Path(f"{adapter_label(file.path)}-{form}.safetensors"))
    save_tensors(target, *convert(file, form))
    typer.echo(target)


@app.command()
def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE[:WEIGHT]...",
            help="LoRA files, runs, or owner/name of the Hub; weight 1 if not given.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The LoRA file to write; with --base a folder, which is made.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Reduce to this rank, by SVD; default: the sum of ranks, which is exact.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Merge into this model: embedded, or a diffusers folder.")] = None,
) -> None:
    """Add up adapters into one, or into the weights of a base model."""
    from ngrpo_lora.adapter_file import parse_weighted, save_tensors
    from ngrpo_lora.merging import merge as merge_adapters
    from ngrpo_lora.merging import merge_into_base

    merged = merge_adapters([parse_weighted(text) for text in adapters], rank)
    if base is None:
        save_tensors(output, merged.tensors(), merged.metadata)
    else:
        merge_into_base(merged, base, output)
    typer.echo(output if rank is None else f"{output}: relative error {merged.error:.3g} at rank {rank}")


Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        "-r",
        metavar="REWARD",
        help="A reward's name, or a mapping as in rewards.train, '{name: NAME, cache: true}'; repeat for several.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto (prefers a GPU), cpu, cuda, cuda:N or mps.")]


@app.command()
def score(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Pictures, folders of pictures; or runs.", show_default=False),
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

    from ngrpo_lora import comparison

    if runs:
        _make_folder(output)
        differences = [d for run in runs for d in comparison.compare_evaluations(run, output)]
        typer.echo(comparison.differences_table(differences))
    else:
        from ngrpo_lora.pictures import collect

        configs = comparison.parse_rewards(reward or [])
        rows, _, columns = (grid or "").partition("x")
        pictures = collect(sources, prompt, (int(rows), int(columns)) if grid else None)
        place = _device(device)
        _make_folder(output)
        typer.echo(comparison.score_pictures(pictures, configs, output, place))
    typer.echo(f"\ntables and pictures: {output}")


@app.command()
def compare(
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ADAPTER...", help="LoRA files, folders of runs, or owner/name of the Hub.", show_default=False
        ),
    ] = None,
    reward: Rewards = None,
    base: Annotated[bool, typer.Option(help="Compare with the base model; --no-base: with the first ADAPTER.")] = True,
    prompts: Annotated[str, typer.Option(help="Prompts, in the form of prompts.held_out.")] = "world:held_out",
    num_prompts: Annotated[int, typer.Option(min=1, help="Different prompts, at most.")] = 48,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 2,
    seed: Annotated[
        int, typer.Option(min=0, help="Which prompts, and the seed of the first picture; the rest follow it.")
    ] = 1000,
    model: Annotated[
        str | None,
        typer.Option(help="embedded, a diffusers folder or a Hub id; default: the model that the adapters name."),
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

    from ngrpo_lora import comparison
    from ngrpo_lora.adapter_file import find_adapter

    files = [find_adapter(adapter, "ADAPTER") for adapter in adapters or []]

    if votes:
        typer.echo(comparison.votes_table(comparison.read_votes(votes)))
        return
    configs = comparison.parse_rewards(reward or [])
    drawn = comparison.distinct_prompts(prompts, num_prompts, seed)
    place = _device(device)
    entered = comparison.contestants(files, model, base, place)
    _make_folder(output)
    differences = comparison.compare_adapters(entered, drawn, seeds, seed, configs, output, place)
    typer.echo(comparison.differences_table(differences))
    typer.echo(f"\nside by side: {output / 'side_by_side.html'}\nblind vote:   {output / 'blind.html'}")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a run.", show_default=False)],
    repo: Annotated[str | None, typer.Option(help="owner/name; default: the run's own hub.repo.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a repository that is made.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made when missing, or refs/pr/N.")] = None,
    pull_request: Annotated[
        bool | None, typer.Option("--pull-request/--no-pull-request", help="Open one.", show_default=False)
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Push a run to the Hub: its newest adapter, with model card, pictures, curve and figures."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"RUN must be the output folder of a run, but {str(run)!r} holds no config.yaml")

    from ngrpo_lora.config import load_config

    given = {"repo": repo, "private": private, "revision": revision, "create_pr": pull_request}
    given["commit_message"] = message
    overrides = [f"hub.{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    hub = load_config(run / "config.yaml", overrides).hub
    if hub.repo is None:
        raise ConfigError("--repo must be given, as the run's hub.repo is null; for example --repo owner/name")

    from ngrpo_lora.hub import push_run

    typer.echo(push_run(run, hub))


@app.command()
def curves(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs.", show_default=False)],
    output: Annotated[Path, typer.Option(help="PNG file for the curves.")] = Path("curves.png"),
) -> None:
    """Curves of runs: held-out figures before and after as a Markdown table, and their curves as a picture."""
    from ngrpo_lora.tracking import comparison_table, read_metrics

    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise ConfigError(f"RUN must be the output folder of a run, but {str(run)!r} holds no metrics.jsonl")
        if not read_metrics(run / "metrics.jsonl"):
            raise ConfigError(f"RUN must have finished its first evaluation, but {str(run)!r} has no metrics yet")

    from ngrpo_lora.report import write_comparison

    typer.echo(comparison_table(runs))
    typer.echo(f"\ncurves: {write_comparison(runs, output)}")


bench_app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@bench_app.command()
def overhead(
    arguments: RunArguments = None,
    iterations: Annotated[int, typer.Option(min=1, help="Timed iterations of each variant.")] = 5,
) -> None:
    """What each speed setting is worth here: a configuration as it is, and with each of them the other way."""
    from ngrpo_lora.config import load_config

    config = load_config(*_split(arguments))

    from ngrpo_lora.bench import overhead_table

    overhead_table(config, iterations, typer.echo)


@bench_app.command()
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

    config = load_config(*_split(arguments))

    from ngrpo_lora.bench import gpu_table

    gpu_table(config, size or [config.model.height_px], batch or [1, 2, 4], repeats, typer.echo)


@bench_app.command()
def solver(
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="Solver steps; repeat for several.", show_default=False)
    ] = None,
    shift: Annotated[
        list[float] | None, typer.Option(min=0.01, help="Timestep shift; repeat for several.", show_default=False)
    ] = None,
) -> None:
    """What the solver errs by on a flow whose answer is known, its order, and what integer timesteps cost.

    Steps are 4, 8, 16, ... 1024 and shifts 1 and 3, unless given.
    """
    from ngrpo_lora.bench_solver import solver_table

    solver_table(steps or [2**power for power in range(2, 11)], shift or [1.0, 3.0], typer.echo)


@bench_app.command()
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
    from ngrpo_lora.bench_pipeline import overhead_table

    overhead_table(widen or [1, 4], size or [64], steps or [8, 28], repeats, typer.echo)


prompts_app = typer.Typer(help="Look at prompts before training on them.", no_args_is_help=True)
app.add_typer(prompts_app, name="prompts")


@prompts_app.command()
def inspect(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="As in prompts.train, such as mine.txt or hpdv2:test.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Count tokens with its tokenizers: embedded, a diffusers folder or a Hub id.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="Divide as prompts.held_out would.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The run's seed, for the order.")] = 0,
    show: Annotated[int, typer.Option(min=0, help="How many prompts to show.")] = 8,
) -> None:
    """Count prompts, their duplicates, lengths and tokens, and show the first ones that training would draw."""
    from ngrpo_lora.prompt_report import inspect_sources

    _show(inspect_sources(sources, model, held_out, seed, show))


def _make_folder(output: Path) -> None:
    """Make the folder, and make sure that it can be written to."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(f"--output must be a writable folder, got {str(output)!r}: {error.strerror}") from None


def _device(device: str) -> str:
    """The device behind `auto`; one that is not there is an error."""
    from ngrpo_lora.config import DEVICE_PATTERN
    from ngrpo_lora.devices import resolve_device

    if re.match(DEVICE_PATTERN, device) is None:
        raise ConfigError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {device!r}")
    return resolve_device(device)


@app.command()
def config(
    arguments: RunArguments = None,
    describe: Annotated[bool, typer.Option("--describe", help="List all keys with type, default and meaning.")] = False,
) -> None:
    """Check a configuration and print it in full, as YAML."""
    from ngrpo_lora.config import describe as options
    from ngrpo_lora.config import dump_config, load_config

    resolved = load_config(*_split(arguments))
    if describe:
        _print_options(options({"algorithm": resolved.algorithm.name}))
    else:
        typer.echo(dump_config(resolved), nl=False)


@app.command()
def plan(
    arguments: RunArguments = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GiB of each GPU, by its name: exit status 1 where it is not enough.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, each with a process of its own.")] = 1,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Sustained TFLOP/s of a GPU, for an estimate of the time.")
    ] = None,
    measured_s_per_forward: Annotated[
        float | None, typer.Option(min=1e-6, help="Seconds of one forward pass for one sample, in place of --tflops.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON: bytes, FLOPs, counts.")] = False,
) -> None:
    """Say what a run will need, before any weights are loaded: memory by stage, function evaluations, FLOPs."""
    if tflops is not None and measured_s_per_forward is not None:
        raise ConfigError("--tflops and --measured-s-per-forward are two ways to say the same; give one of them")

    from ngrpo_lora.config import load_config

    resolved = load_config(*_split(arguments))

    from ngrpo_lora import plan_report
    from ngrpo_lora.plan import GIB, make_plan

    figures = make_plan(resolved, gpus)
    limit = None if gpu_memory is None else gpu_memory * GIB
    fits = limit is None or figures.fits(limit)
    advice = None if limit is None or fits else plan_report.suggest(resolved, limit, gpus)
    if as_json:
        typer.echo(json.dumps(plan_report.plan_values(figures, limit, advice), indent=1))
    else:
        _show(plan_report.plan_table(figures))
        typer.echo()
        for line in plan_report.plan_lines(figures, tflops, measured_s_per_forward):
            typer.echo(line)
        typer.echo(plan_report.verdict(figures, limit, advice))
    if not fits:
        raise typer.Exit(1)


@app.command()
def presets() -> None:
    """List the presets: model, what they need by `ngrpo plan`, and whether that has been measured."""
    from ngrpo_lora.presets import describe_presets

    _show(describe_presets())


@app.command()
def rewards(
    name: Annotated[
        str | None, typer.Argument(help="A reward, to read about it and its settings.", show_default=False)
    ] = None,
) -> None:
    """List the rewards, or say all about one: its source, range and licence, and its settings."""
    from ngrpo_lora import rewards as package
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
    _print_options(describe_reward(name))


@app.command("reward-server")
def reward_server(
    rewards: Annotated[
        list[str],
        typer.Argument(metavar="REWARD...", help="Names, file.py:function, or as in rewards.train: '{name: ...}'."),
    ],
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine it needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8765,
    device: Annotated[str, typer.Option(help="Where networks run: auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Serve rewards to the reward `remote` of another machine. NGRPO_REWARD_TOKEN is the secret that both share."""
    from ngrpo_lora.config import load_config

    resolved = load_config(overrides=[f"rewards.train=[{', '.join(rewards)}]", f"model.device={device}"])

    from ngrpo_lora.devices import resolve_device
    from ngrpo_lora.reward_server import RewardServer
    from ngrpo_lora.rewards._http import TOKEN_ENV

    token = os.environ.get(TOKEN_ENV)
    with RewardServer(resolved.rewards.train, host, port, resolve_device(resolved.model.device), token) as server:
        typer.echo(f"serving {', '.join(server.scorer.rewards)} at {server.url}; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


def _print_options(options: Iterable[Option]) -> None:
    from rich.table import Table
    from rich.text import Text

    from ngrpo_lora.config import show_value

    table = Table("key", "accepts", "default", "meaning", box=None, pad_edge=False)
    for option in options:
        if option.is_section:
            table.add_row(Text(f"\n{option.key}", style="bold"), "", "", Text(f"\n{option.description}", style="bold"))
        else:
            default = option.default if isinstance(option.default, str) else show_value(option.default)
            table.add_row(*map(Text, (option.key, option.type, default, option.description)))
    _show(table)


def _show(what: Any) -> None:
    """Print a table of rich's as wide as the terminal; wide where there is none."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(what)
