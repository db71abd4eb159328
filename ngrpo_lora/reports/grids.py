"""Grids of pictures with captions, and single pictures in full size."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ngrpo_lora.records.files import written_folder
from ngrpo_lora.records.metrics import PICTURES
from ngrpo_lora.records.pictures import FRAME_RATE, SHEET, save_png

CELL_PX, CAPTION_LINES, LINE_PX = 160, 2, 17
NUM_SHOWN = 4
CLIP_PX = 384
FRAME = "#1a9c3f"
CAPTION_PX = CAPTION_LINES * LINE_PX


def save_grid(
    path: Path,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int = 6,
    caption_lines: int = CAPTION_LINES,
) -> None:
    """Draw a captioned grid with `draw_grid` and write it to a file, which says that it is a contact sheet."""
    save_png(path, draw_grid(images, captions, columns, caption_lines), {SHEET: "contact sheet"})


def draw_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int = 6,
    caption_lines: int = CAPTION_LINES,
    cell_px: int = CELL_PX,
    framed: Container[int] = (),
) -> Image.Image:
    """Images with their captions below, `columns` a row; small ones are enlarged without smoothing.

    Captions keep their line breaks; what is more than `caption_lines` lines is left out. Letters grow with the cell.
    Images whose index is in `framed` have a green frame.
    """
    scale = cell_px / CELL_PX
    rows, caption_px = -(-len(images) // columns), caption_lines * round(LINE_PX * scale)
    sheet = Image.new("RGB", (columns * cell_px, rows * (cell_px + caption_px)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(11 * scale)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = index % columns * cell_px, index // columns * (cell_px + caption_px)
        resample = Image.Resampling.NEAREST if max(image.size) < cell_px else Image.Resampling.LANCZOS
        factor = (cell_px - 6) / max(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        left = x + (cell_px - size[0]) // 2
        if index in framed:
            canvas.rectangle((left - 3, y, left + size[0] + 2, y + size[1] + 5), fill=FRAME)
        sheet.paste(image.resize(size, resample), (left, y + 3))
        lines = wrapped(caption)[:caption_lines]
        canvas.multiline_text((x + 4, y + cell_px), "\n".join(lines), fill="black", font=font, spacing=2 * scale)
    return sheet


def wrapped(caption: str) -> list[str]:
    """The lines of a caption, wrapped to the width of a grid's cell."""
    return [part for line in caption.splitlines() for part in textwrap.wrap(line, 28)]


def save_shown(
    folder: Path,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    pictures: Sequence[str] = (),
) -> None:
    """Write the first `NUM_SHOWN` pictures in full size, each with what was drawn: `0.png`, `1.png`, ...

    They take the place of all that an earlier evaluation left in the folder, which may be more of them.

    Args:
        pictures: `Prompt.pictures` of each prompt; what is empty is not written.
    """
    with written_folder(folder) as partial:
        partial.mkdir()
        for index, image in enumerate(images[:NUM_SHOWN]):
            edited = {PICTURES: pictures[index]} if pictures and pictures[index] else {}
            save_png(partial / f"{index}.png", image, {"prompt": prompts[index], "seed": str(seeds[index])} | edited)


def are_paired(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two pictures of `save_shown` can be compared, by their PNG text: of one prompt, seed and source to edit.

    Earlier versions did not say the source.
    """
    keys = "prompt", "seed", *((PICTURES,) if PICTURES in one and PICTURES in other else ())
    return all(one.get(key) == other.get(key) for key in keys)


def clip(frames: Sequence[Image.Image]) -> bytes:
    """A video as an animated WebP picture that repeats, no longer on a side than CLIP_PX, for the report."""
    small = [frame.copy() for frame in frames]
    for frame in small:
        frame.thumbnail((CLIP_PX, CLIP_PX))
    buffer, first = io.BytesIO(), small[0]
    duration_ms = round(1000 / FRAME_RATE)
    first.save(buffer, "WEBP", save_all=True, append_images=small[1:], duration=duration_ms, loop=0, quality=80)
    return buffer.getvalue()
