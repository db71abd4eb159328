"""The `ngrpo` command. Heavy imports are inside the commands, so that `--help` and configuration errors are fast."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ngrpo_lora.errors import ConfigError, UserError

__all__ = ["app"]


class _Group(TyperGroup):
    """Shows a UserError as its message alone, with exit status 2; every other error keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that no command here needs


@app.command()
def train(arguments: RunArguments = None) -> None:
    """Train a LoRA: `ngrpo train` for the embedded demo, `ngrpo train run.yaml trainer.num_iterations=100`."""
    from ngrpo_lora.config import load_config
    from ngrpo_lora.preflight import check_run

    config = load_config(*_split(arguments))
    check_run(config)

    from ngrpo_lora import trainer

    trainer.train(config)


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
    """Draw images; the same prompt and seed give the same pixels, whatever else is drawn with them."""
    if not all(text.strip() for text in prompt):
        raise ConfigError("--prompt must not be empty; say what to draw, for example --prompt 'a red star'")
    weights = None if adapter is None else _adapter_file(adapter)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output must be a writable folder, got {str(output)!r}: {error.strerror}") from None

    from ngrpo_lora.sampling import sample_images

    seeds = list(range(seed, seed + num_images))
    images = sample_images(adapter=weights, model=model, prompts=prompt, seeds=seeds, strength=strength)
    for index, image in enumerate(images):  # prompt-major
        text, image_seed = prompt[index // num_images], seeds[index % num_images]
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
        path = output / f"{index // num_images:03d}-{slug}-seed{image_seed}.png"
        image.save(path)
        typer.echo(path)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs.", show_default=False)],
    output: Annotated[Path, typer.Option(help="PNG file for the curves.")] = Path("comparison.png"),
) -> None:
    """Compare runs: held-out figures before and after as a Markdown table, and their curves as a picture."""
    from ngrpo_lora.tracking import comparison_table, read_metrics

    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise ConfigError(f"RUN must be the output folder of a run, but {str(run)!r} holds no metrics.jsonl")
        if not read_metrics(run / "metrics.jsonl"):
            raise ConfigError(f"RUN must have finished its first evaluation, but {str(run)!r} has no metrics yet")

    from ngrpo_lora.report import write_comparison

    typer.echo(comparison_table(runs))
    typer.echo(f"\ncurves: {write_comparison(runs, output)}")


def _adapter_file(path: Path) -> Path:
    """The LoRA file itself, also when its folder or its run's folder is given."""
    name = "pytorch_lora_weights.safetensors"
    for candidate in (path, path / name, path / "adapter" / name):
        if candidate.is_file():
            return candidate
    where = f"{str(path)!r} holds no {name}" if path.is_dir() else f"{str(path)!r} does not exist"
    raise ConfigError(f"--adapter must be a LoRA file or a run's folder, but {where}")


@app.command()
def config(
    arguments: RunArguments = None,
    describe: Annotated[bool, typer.Option("--describe", help="List all keys with type, default and meaning.")] = False,
) -> None:
    """Check a configuration and print it in full, as YAML."""
    from ngrpo_lora.config import dump_config, load_config

    resolved = load_config(*_split(arguments))
    if describe:
        _print_options(resolved.algorithm.name)
    else:
        typer.echo(dump_config(resolved), nl=False)


def _print_options(algorithm: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ngrpo_lora.config import describe, show_value

    table = Table("key", "accepts", "default", "meaning", box=None, pad_edge=False)
    for option in describe({"algorithm": algorithm}):
        if option.is_section:
            table.add_row(Text(f"\n{option.key}", style="bold"), "", "", Text(f"\n{option.description}", style="bold"))
        else:
            default = option.default if isinstance(option.default, str) else show_value(option.default)
            table.add_row(*map(Text, (option.key, option.type, default, option.description)))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
