"""`ngrpo info`, `formats`, `export` and `merge`: LoRA files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ngrpo_lora.cli.app import print_table
from ngrpo_lora.errors import ConfigError

Family = Annotated[
    str | None,
    typer.Option(
        metavar="FAMILY", help="The model's family, such as flux, for a file that fits several.", show_default=False
    ),
]


def info(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="LoRA files of any trainer, runs, or owner/name of the Hub.", show_default=False
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON list.")] = False,
    family: Family = None,
) -> None:
    """Say what LoRA files are and want: trainer, base, ranks, alpha, layers, effect, and how to draw with them."""
    from ngrpo_lora.adapters.families import check_family
    from ngrpo_lora.adapters.report import describe, lines

    check_family(family)
    said = [describe(file, family) for file in files]
    if as_json:
        typer.echo(json.dumps(said, indent=1))
        return

    from rich.table import Table
    from rich.text import Text

    for one in said:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in lines(one):
            table.add_row(Text(name, style="bold"), Text(value))
        print_table(table)
        typer.echo()


def formats(as_json: Annotated[bool, typer.Option("--json", help="As a JSON list, one entry a cell.")] = False) -> None:
    """Say how trainers name the layers in LoRA files, and who reads and writes which names, for every model family."""
    from ngrpo_lora.adapters.layers import NAMES
    from ngrpo_lora.adapters.namings import cells

    said = [*cells()]
    if as_json:
        typer.echo(json.dumps(said, indent=1))
        return

    from rich.table import Table
    from rich.text import Text

    table = Table("naming", "key", *NAMES, "written by", box=None, pad_edge=False)
    for naming in dict.fromkeys(cell["naming"] for cell in said):
        row = {cell["family"]: cell for cell in said if cell["naming"] == naming}
        one = next(iter(row.values()))
        marks = [_marks(row[family]) if family in row else "" for family in NAMES]
        table.add_row(*map(Text, (naming, one["key"], *marks, one["trainers"])))
    print_table(table)
    typer.echo(
        "\n{diffusers}, {original}: the layer's name there, {diffusers_}, {original_}: with underscores for dots,"
    )
    typer.echo("{part}: the original name and, where it is several of diffusers' layers, the number of one.")
    typer.echo(
        "R: read here. W: written by `ngrpo export`. D: read by diffusers, d: but for the layers below. C, c: ComfyUI."
    )
    lacking: dict[tuple[str, str, str], list[str]] = {}
    for cell in said:
        for reader, missing in cell["readers"].items():
            if missing:
                lacking.setdefault((cell["family"], reader, ", ".join(missing)), []).append(cell["naming"])
    lacks = Table("family", "reader", "leaves out", "of files named as", box=None, pad_edge=False)
    for (family, reader, missing), names in lacking.items():
        lacks.add_row(*map(Text, (family, reader, missing, ", ".join(names))))
    typer.echo()
    print_table(lacks)


def _marks(cell: dict[str, Any]) -> str:
    """Who reads and writes one family's layers in one naming, as letters."""
    letters = {"diffusers": "D", "comfyui": "C"}
    known = [letters[reader].lower() if missing else letters[reader] for reader, missing in cell["readers"].items()]
    return "".join(["R", *["W"] * (cell["written"] is not None), *known])


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
    family: Family = None,
) -> None:
    """Write an adapter in another format, with its alpha folded in."""
    if form not in ("diffusers", "comfyui", "kohya"):
        raise ConfigError(f"--format must be diffusers, comfyui or kohya, got {form!r}")

    from ngrpo_lora.adapters.families import check_family
    from ngrpo_lora.adapters.finding import adapter_label, find_adapter
    from ngrpo_lora.adapters.reading import log_warnings, read_adapter_file
    from ngrpo_lora.adapters.writing import convert, save_tensors

    check_family(family)
    file = read_adapter_file(find_adapter(source, "FILE"), family)
    log_warnings(file)
    beside = file.path.with_stem(f"{file.path.stem}-{form}")
    target = output or (beside if Path(source).exists() else Path(f"{adapter_label(file.path)}-{form}.safetensors"))
    save_tensors(target, *convert(file, form))
    typer.echo(target)


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
    family: Family = None,
) -> None:
    """Add up adapters into one, or into the weights of a base model."""
    from ngrpo_lora.adapters.families import check_family
    from ngrpo_lora.adapters.merging import merge as merge_adapters
    from ngrpo_lora.adapters.merging import merge_into_base
    from ngrpo_lora.adapters.writing import save_tensors
    from ngrpo_lora.config.paths import parse_weighted

    check_family(family)
    merged = merge_adapters([parse_weighted(text) for text in adapters], rank, family)
    if any(output.resolve() == file.path.resolve() for file in merged.files):
        raise ConfigError(f"--output must not be one of the files that are merged, got {str(output)!r}; name a new one")
    if base is None:
        save_tensors(output, merged.tensors(), merged.metadata)
    else:
        merge_into_base(merged, base, output)
    typer.echo(output if rank is None else f"{output}: relative error {merged.error:.3g} at rank {rank}")
