"""The `ngrpo` command. Heavy imports are inside the commands, so that `--help` and configuration errors are fast."""

from __future__ import annotations

import json
import logging
import os
import re
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
        typer.Option(min=1, help="Processes on this machine; default: one for each GPU.", show_default=False),
    ] = None,
) -> None:
    """Train a LoRA: `ngrpo train` for the embedded demo, `ngrpo train run.yaml trainer.num_iterations=100`.

    All GPUs of this machine take part. For several machines start it with `accelerate launch -m ngrpo_lora train ...`.
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
    count = distributed.process_count(config.model.device, num_processes)
    if count == 1:
        _train(config)
    elif status := distributed.launch(count, [sys.executable, "-m", "ngrpo_lora", "train", *(arguments or [])]):
        raise typer.Exit(status if status > 0 else 1)


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
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; repeat for several prompts.")],
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA file, or the folder of a run; without it the base model draws.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image of every prompt.")] = 0,
    num_images: Annotated[int, typer.Option(min=1, help="Images per prompt, with seeds SEED, SEED + 1, ...")] = 1,
    strength: Annotated[float, typer.Option(help="Scale of the adapter; 0 is the base model.")] = 1.0,
    model: Annotated[
        str | None,
        typer.Option(help="embedded, a diffusers folder or a Hub id; default: the model that the adapter names."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the PNG files; made when missing.")] = Path("samples"),
) -> None:
    """Draw images, or videos as animated PNG; the same prompt and seed give the same pixels, whatever else is drawn."""
    if not all(text.strip() for text in prompt):
        raise ConfigError("--prompt must not be empty; say what to draw, for example --prompt 'a red star'")
    weights = None if adapter is None else _adapter_file("--adapter", adapter)
    _make_folder(output)

    from ngrpo_lora.pictures import save_png
    from ngrpo_lora.sampling import sample_images

    seeds = list(range(seed, seed + num_images))
    images = sample_images(adapter=weights, model=model, prompts=prompt, seeds=seeds, strength=strength)
    frames = len(images) // (len(prompt) * num_images)  # more than one of a video model
    for index, first in enumerate(range(0, len(images), frames)):  # prompt-major
        text, image_seed = prompt[index // num_images], seeds[index % num_images]
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
        path = output / f"{index // num_images:03d}-{slug}-seed{image_seed}.png"
        save_png(path, images[first], {"prompt": text, "seed": str(image_seed)}, images[first + 1 : first + frames])
        typer.echo(path)


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
        typer.Argument(metavar="ADAPTER...", help="LoRA files, or folders of runs.", show_default=False),
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
    files = [_adapter_file("ADAPTER", adapter) for adapter in adapters or []]

    from ngrpo_lora import comparison

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


def _adapter_file(what: str, path: Path) -> Path:
    """The LoRA file itself, also when its folder or its run's folder is given."""
    name = "pytorch_lora_weights.safetensors"
    for candidate in (path, path / name, path / "adapter" / name):
        if candidate.is_file():
            return candidate
    where = f"{str(path)!r} holds no {name}" if path.is_dir() else f"{str(path)!r} does not exist"
    raise ConfigError(f"{what} must be a LoRA file or a run's folder, but {where}")


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
