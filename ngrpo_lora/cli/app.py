"""The `ngrpo` command. Heavy imports are inside the commands, so that `--help` and configuration errors are fast."""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # looking for plug-ins takes longer than checking a file

import typer  # noqa: E402
from typer.core import TyperGroup  # noqa: E402

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.records.files import disk_is_full

if TYPE_CHECKING:
    from ngrpo_lora.config import Option

__all__ = ["app"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 2**29
LARGEST_KEPT_BYTES = 2**25  # the most that glibc takes

made = ExitStack()  # folders that the command made: what stays empty goes again


HOME_OR_VARIABLE = re.compile(r"(--[a-z-]+=)?((?:~[\w.-]*|\$[A-Za-z_]\w*|\$\{\w+\})(?:[/\\].*)?)", re.ASCII | re.DOTALL)


class _Group(TyperGroup):
    """Shows a UserError or a full disk as its message alone, with exit status 2; other errors keep their traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal or pipe that is not UTF-8 shows \u2192 for an arrow
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, [*map(as_meant, args)])
        except UserError as error:
            typer.echo(f"ngrpo: {error}", err=True)
            raise typer.Exit(2) from None

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"ngrpo: {error}", err=True)
            raise typer.Exit(2) from None
        except typer.BadParameter as error:
            if error.param is None or not error.message:  # of one that is missing, the usage says more
                raise
            typer.echo(f"ngrpo: {option_problem(error)}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:
            typer.echo(f"ngrpo: {system_error(error)}", err=True)
            raise typer.Exit(2) from None
        finally:
            made.close()


def option_problem(error: typer.BadParameter) -> str:
    """Rule and value of an option that the command line gave an impossible value, in place of the parser's words."""
    from pydantic import ValidationError

    from ngrpo_lora.config.problems import rule_in_words

    name = option_name(error.param)
    if not isinstance(error.__cause__, ValidationError):
        return f"{name}: {error.message}"
    detail = error.__cause__.errors()[0]
    is_number = not detail["type"].endswith("_parsing")
    return f"{name} {rule_in_words(detail)}, got {detail['input'] if is_number else repr(detail['input'])}"


def option_name(option: Any) -> str:
    """The longest name of an option, which says what it is."""
    return max(option.opts, key=len)


def system_error(error: OSError) -> str:
    """The message of a full disk or of a name that is too long; other errors of the system are raised again."""
    if error.errno == errno.ENAMETOOLONG:
        name = f"{str(error.filename)[:40]!r}..."
        return f"a path must have names that a file can have, got {name}; shorten it"
    if not disk_is_full(error):
        raise error
    place = f" at {error.filename}" if error.filename else ""
    return f"the disk is full{place} ({error.strerror}); make room, and then go on: a run by resume=latest"


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


def as_meant(word: str) -> str:
    """A word of the command line with the `~` or `$NAME` that it begins with replaced, as a shell does for most words.

    Words such as `key=~/folder` pass unchanged: the configuration knows which keys are paths.

    Raises:
        ConfigError: it is not UTF-8, or a variable is not set.
    """
    from ngrpo_lora.records.texts import check_text

    try:
        check_text(word)
    except ValueError:
        remedy = "rename the file or correct the text, or set a UTF-8 locale, such as LC_ALL=C.UTF-8"
        raise ConfigError(f"words must be UTF-8 text, got {word!r}; {remedy}") from None
    if (found := HOME_OR_VARIABLE.fullmatch(word)) is None:
        return word

    from ngrpo_lora.config.paths import expanded

    try:
        return f"{found[1] or ''}{expanded(found[2])}"
    except ValueError as error:
        raise ConfigError(f"a path {error}") from None


def split_arguments(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """The first word is the config when it has no `=`, or is a file that has one in its path; others are overrides."""
    words = arguments or []
    path = words and (os.path.isfile(words[0]) or re.fullmatch(r"[^=]*[/\\].*\.ya?ml", words[0]))
    return (words[0], words[1:]) if words and (path or "=" not in words[0]) else (None, words)


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
    keep_freed_memory()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("ngrpo_lora").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that no command here needs
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # and of torchvision, nor of that


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free, up to `KEPT_BYTES`; it had given it back, and got it anew, in every pass.

    Other allocators have no such setting, and are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def group(name: str, help: str) -> typer.Typer:
    """A command of commands, `ngrpo NAME ...`."""
    commands = typer.Typer(help=help, no_args_is_help=True)
    app.add_typer(commands, name=name)
    return commands


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


def make_folder(output: Path, option: str = "--output") -> None:
    """Make the folder that an option names, and make sure that it can be written to; left empty, it goes again."""
    from ngrpo_lora.records.ownership import making

    try:
        made.enter_context(making(output))
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(f"{option} must be a writable folder, got {str(output)!r}: {error.strerror}") from None


def finite(option: typer.CallbackParam, value: Any) -> Any:
    """The number, or numbers, that an option was given; NaN, which every range lets pass, and infinity are refused."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"{option_name(option)} must be a finite number, got {number}")
    return value


def model_name(model: str | None) -> str | None:
    """The model that an option names; what can be none is refused before anything is loaded."""
    from ngrpo_lora.config.presets import check_model

    if model is not None:
        check_model(model, "--model")
    return model


def asked_device(device: str) -> str:
    """The device behind `auto`; one that is not there is an error."""
    from ngrpo_lora.config.section import DEVICE_PATTERN
    from ngrpo_lora.devices import resolve_device

    if re.match(DEVICE_PATTERN, device) is None:
        raise ConfigError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {device!r}")
    return resolve_device(device)


def print_options(options: Iterable[Option]) -> None:
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
    print_table(table)


def print_table(what: Any) -> None:
    """Print a table of rich's as wide as the terminal; wide where there is none."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(what)
