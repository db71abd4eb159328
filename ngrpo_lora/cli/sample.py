"""`ngrpo sample`: draw pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ngrpo_lora.cli.app import make_folder, model_name
from ngrpo_lora.errors import ConfigError
from ngrpo_lora.seeds import consecutive_seeds

if TYPE_CHECKING:
    from ngrpo_lora.prompts.pictures import SourcePicture
    from ngrpo_lora.sampling.recipes import Drawing

PromptTexts = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="What to draw; repeat for several prompts.")
]
Source = Annotated[
    str | None,
    typer.Option(help="The picture to edit, or to start a video from, for prompts that have none of their own."),
]
PromptSource = Annotated[
    str | None, typer.Option(help="More of them: a source as in prompts.train, such as mine.txt or hpdv2:test.")
]
NumPrompts = Annotated[int, typer.Option(min=1, help="How many to take of --prompts.")]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:STRENGTH]",
        help="LoRA file of any trainer, the folder of a run, or owner/name of the Hub; repeated, they draw "
        "together. Without it the base model draws.",
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the first image of every prompt; default: 0.")]
NumImages = Annotated[int, typer.Option(min=1, help="Images per prompt, with seeds SEED, SEED + 1, ...")]
Strength = Annotated[
    float | None, typer.Option(help="Of adapters that have none beside their name; 1 is as trained, 0 the base.")
]
BaseToo = Annotated[bool, typer.Option("--base-too", help="Draw everything with the base model too.")]
Grid = Annotated[bool, typer.Option("--grid", help="Each adapter draws alone: grid.png has prompts by adapters.")]
Like = Annotated[
    Path | None,
    typer.Option(help="A picture that this command drew: draw it again, with what else is given changed."),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="embedded, a diffusers folder or a Hub id; default: the model that the adapter names.", callback=model_name
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Solver steps; default: the first adapter's that says how it is drawn, else the model's, as all below."
    ),
]
Shift = Annotated[float | None, typer.Option(help="Timestep shift.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.")]
Solver = Annotated[str | None, typer.Option(help="dpmpp_2m or euler.")]
Height = Annotated[int | None, typer.Option(help="Pixels; default, with --width: what suits the source of an edit.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Output = Annotated[Path, typer.Option(help="Folder for the PNG files; made when missing.")]


OR_SOURCE = ", or one with --source"  # how else a source is given


def sample(
    prompt: PromptTexts = None,
    prompts: PromptSource = None,
    num_prompts: NumPrompts = 24,
    adapter: Adapter = None,
    seed: Seed = None,
    num_images: NumImages = 1,
    strength: Strength = None,
    base_too: BaseToo = False,
    grid: Grid = False,
    like: Like = None,
    model: Model = None,
    steps: Steps = None,
    shift: Shift = None,
    guidance: Guidance = None,
    solver: Solver = None,
    height: Height = None,
    width: Width = None,
    output: Output = Path("samples"),
    source: Source = None,
) -> None:
    """Draw images, or videos as animated PNG; the same prompt and seed give the same pixels, whatever else is drawn.

    Every file says how it was drawn, so that --like can draw it again.
    """
    check_asked(prompt, prompts, like)
    adapters = named_adapters(adapter or [], 1.0 if strength is None else strength)
    picture = None if source is None else named_picture(source)
    make_folder(output)

    from ngrpo_lora.config.paths import finite_strength
    from ngrpo_lora.models._loading import family_class
    from ngrpo_lora.prompts import sources
    from ngrpo_lora.prompts.checking import check_sources, warn_of_cropping
    from ngrpo_lora.prompts.files import Prompt
    from ngrpo_lora.sampling import recipes, settings

    follow_sources = height is None and width is None and (like is None or source is not None)
    if like is None:
        info = settings.drawing_settings(settings.leading([path for path, _ in adapters]), model)
    else:
        recipe = recipes.read_recipe(like, same_adapters=not adapters, same_source=source is None, base=model)
        info, picture = settings.on_this_machine(recipe.info, model), picture or recipe.prompt.source
        prompt, seed = prompt or [recipe.prompt.text] * (not prompts), recipe.seed if seed is None else seed
        again = [(str(path), own if strength is None else strength) for path, own in recipe.adapters]
        adapters = adapters or [(Path(path), finite_strength(path, factor)) for path, factor in again]
    wanted = [*map(Prompt, prompt or []), *(sources.listed_prompts(prompts, num_prompts) if prompts else [])]
    wanted = [one if one.source else one._replace(source=picture) for one in wanted]
    options = {"steps": steps, "shift": shift, "guidance": guidance, "solver": solver, "height": height, "width": width}
    info = settings.editing(settings.with_settings(info, options), wanted)
    sizes = check_sources("--prompt", wanted, family_class(info.model).edits, info.model.path, OR_SOURCE)
    if not follow_sources:
        warn_of_cropping("--width and --height", sizes, (info.model.width_px, info.model.height_px))
    columns = recipes.columns_of(adapters, grid, base_too)
    seeds = consecutive_seeds(seed or 0, num_images)
    save_drawings(recipes.draw_columns(info, columns, wanted, seeds, follow_sources), len(columns), output, grid)


def check_asked(prompt: list[str] | None, prompts: str | None, like: Path | None) -> None:
    """Raise ConfigError where there is nothing to draw, or an empty prompt."""
    if not all(text.strip() for text in prompt or []):
        raise ConfigError("--prompt must not be empty; say what to draw, for example --prompt 'a red star'")
    if not (prompt or prompts or like):
        raise ConfigError("--prompt, --prompts or --like must be given, for example --prompt 'a red star'")


def named_adapters(texts: list[str], strength: float) -> list[tuple[Path, float]]:
    """The files that --adapter names, each with its own strength, or the given one."""
    from ngrpo_lora.adapters.finding import find_adapter
    from ngrpo_lora.config.paths import parse_weighted

    chosen = [parse_weighted(text, strength) for text in texts]
    return [(find_adapter(path, "--adapter"), factor) for path, factor in chosen]


def named_picture(source: str) -> SourcePicture:
    """The picture that --source names, by a path or a `file://` URL; it can be read."""
    if not source.strip():
        raise ConfigError("--source must not be empty; name the picture to edit")

    from ngrpo_lora.prompts.pictures import SourcePicture, find_picture

    picture = find_picture(source, Path(), "--source") or SourcePicture(Path(source), source, "--source")
    picture.load()
    return picture


def save_drawings(drawings: Iterable[Drawing], num_columns: int, output: Path, grid: bool) -> None:
    """Write each drawing as a PNG file as soon as it is there, and on demand all of them as one sheet."""
    from ngrpo_lora.records.pictures import save_png

    cells, captions = [], []
    for drawing in drawings:
        slug = re.sub(r"[^a-z0-9]+", "-", drawing.prompt.lower()).strip("-")[:60] or "prompt"
        label = f"-{drawing.column.label}" if num_columns > 1 else ""
        path = output / f"{drawing.row:03d}-{slug}-seed{drawing.seed}{label}.png"
        save_png(path, drawing.frames[0], drawing.text, drawing.frames[1:])
        typer.echo(path)
        cells.append(drawing.frames[len(drawing.frames) // 2])
        captions.append(f"{drawing.column.label}, seed {drawing.seed}\n{drawing.prompt}")
    if grid:
        from ngrpo_lora.reports.grids import save_grid

        save_grid(output / "grid.png", cells, captions, num_columns, caption_lines=3)
        typer.echo(output / "grid.png")
