"""Reads pictures and their prompts from files, folders and grids, and writes PNG files that hold their prompt.

Wherever a picture of the user's is read, it is used as people see it: see `as_seen`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.records.files import written
from ngrpo_lora.records.texts import decoded, parse_json

__all__ = ["NoWhite", "Picture", "as_seen", "collect", "read_png_text", "save_png"]

SHEET = "ngrpo-sheet"  # keyword of the PNG text of what shows other pictures, and is none to be scored itself
METADATA = "metadata.jsonl"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError)  # of Pillow, for bad files
MAX_PIXELS = 178_956_970  # Pillow's; what is larger may be a bomb: a small file that fills the memory
WITHOUT_WHITE = ("I", "F")  # modes of 32-bit pixels, whose largest value is not said
VIDEOS = ("GIF", "PNG", "WEBP")  # other formats keep thumbnails and depth maps as further frames
FRAME_RATE = 16  # per second


class NoWhite(ValueError):
    """A picture whose pixels do not say which of them is white; the message says what they are, and the remedy."""


def as_seen(file: Image.Image) -> Image.Image:
    """An opened picture, or the frame of a video, as people see it: upright, in 8-bit RGB, on white.

    Raises:
        NoWhite: it has 32-bit or floating-point pixels.
    """
    if file.mode in WITHOUT_WHITE:
        raise NoWhite(f"has 32-bit pixels (mode {file.mode}); save it with 8 or 16 bits a channel")
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@contextmanager
def opened(path: Path, what: str) -> Iterator[Image.Image]:
    """Open a picture file for as long as the block runs, which may read it.

    Args:
        what: it must be, for messages.
    Raises:
        UserError: not an image, a damaged one, more than `MAX_PIXELS`, or pixels that `as_seen` does not take.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of half as many, which we take
            file = Image.open(path)
        with file:
            yield file
    except Image.DecompressionBombError:
        rule = f"{str(path)!r} must have at most {MAX_PIXELS:,} pixels, but it has more"
        raise UserError(f"{rule}; make it smaller, or cut it into several") from None
    except NoWhite as error:
        raise UserError(f"{str(path)!r} must have pixels with a known white, but it {error}") from None
    except UNREADABLE as error:
        raise UserError(f"{str(path)!r} must be a readable {what}, but it is not: {error}") from None


@dataclass(frozen=True)
class Picture:
    """A picture file, or a cell of one, with its prompt and the other metadata of its folder's metadata.jsonl."""

    path: Path
    prompt: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    box: tuple[int, int, int, int] | None = None
    """The cell's left, upper, right and lower edge in pixels; None is the whole file."""
    line: int | None = None
    """Its line of metadata.jsonl, counted from 1; None where it has none."""

    @property
    def name(self) -> str:
        """The file's path, followed for a cell by its upper left corner in pixels: `grid.png#64,0`."""
        return str(self.path) if self.box is None else f"{self.path}#{self.box[0]},{self.box[1]}"

    @property
    def place(self) -> str:
        """Where its metadata stand, for messages."""
        path = self.path.parent / METADATA
        return f"metadata of {str(self.path)!r}" if self.line is None else f"line {self.line} of {str(path)!r}"

    def load(self) -> Image.Image:
        """The picture as people see it, in 8-bit RGB; of a video its middle frame.

        Raises:
            UserError: as `opened`.
        """
        with opened(self.path, "image") as file:
            if file.format in VIDEOS:
                file.seek(getattr(file, "n_frames", 1) // 2)
            image = as_seen(file)
        return image if self.box is None else image.crop(self.box)

    def frames(self) -> list[Image.Image]:
        """All frames of a video, of each the part that `load` gives of the middle one; of a picture itself alone.

        Raises:
            UserError: as `load`.
        """
        with opened(self.path, "video") as file:
            if file.format not in VIDEOS or getattr(file, "n_frames", 1) == 1:
                return [self.load()]
            frames = [as_seen(frame) for frame in ImageSequence.Iterator(file)]
        return frames if self.box is None else [frame.crop(self.box) for frame in frames]


def collect(sources: Sequence[Path], prompt: str | None = None, grid: tuple[int, int] | None = None) -> list[Picture]:
    """The pictures of files and folders, in order; each is read once, so that a bad one is reported at once.

    Contact sheets that this package has written into a folder are none of its pictures.

    Args:
        prompt: the prompt of all of them. None: each one's own, looked for in this order: `name.txt` beside it, its
            line of `metadata.jsonl` in its folder (`{"file_name": ..., "prompt": ...}`), or its own PNG text, which
            counts only with a seed beside it (ComfyUI keeps a graph under `prompt`).
        grid: (rows, columns) of equal cells in every file; each cell is a picture.
    Raises:
        UserError: nothing there, not an image, a grid that does not divide it, or metadata.jsonl that is malformed.
    """
    paths = list(_files(sources))
    folders = {folder: _folder_metadata(folder) for folder in {path.parent for path in paths}}
    return [cell for path in paths for cell in _cells(_described(path, folders[path.parent], prompt), grid)]


def _files(sources: Sequence[Path]) -> Iterator[Path]:
    for source in sources:
        if source.is_dir():
            found = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
            kept = [path for path in found if SHEET not in read_png_text(path)]
            if not kept:
                what = "contact sheets only" if found else "none"
                raise ConfigError(f"SOURCE must hold pictures ({', '.join(SUFFIXES)}), but {str(source)!r} has {what}")
            yield from kept
        elif source.is_file():
            yield source
        else:
            raise ConfigError(f"SOURCE must be a picture, a folder of them, or a run, but {str(source)!r} is not there")


def _described(path: Path, folder: dict[str, tuple[int, dict[str, Any]]], prompt: str | None) -> Picture:
    line, row = folder.get(path.name, (None, {}))
    metadata = dict(row)
    own, sidecar = metadata.pop("prompt", None), path.with_suffix(".txt")
    if prompt is None and sidecar.is_file():
        try:
            prompt = decoded(sidecar.read_bytes(), sidecar.name).strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{str(sidecar)!r} must be readable UTF-8 text, but it is not: {error}") from None
    if prompt is None:
        prompt = own
    if prompt is None:
        text = read_png_text(path)
        prompt = text["prompt"] if {"prompt", "seed"} <= text.keys() else None
    return Picture(path, prompt or None, metadata, line=line)


def _folder_metadata(folder: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """The lines of `metadata.jsonl` by file name, each with its number, as Hugging Face's image folders have them."""
    path = folder / METADATA
    rows: dict[str, tuple[int, dict[str, Any]]] = {}
    if not path.is_file():
        return rows
    try:
        lines = decoded(path.read_bytes(), path.name).splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be readable UTF-8 text, but it is not: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = parse_json(line)
                rows[row.pop("file_name")] = number, row
                if not isinstance(row.get("prompt"), str | None):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError):
                form = '{"file_name": "a.png", "prompt": "a cat"}'
                raise ConfigError(f"{path} must hold lines like {form}, but line {number} is {line:.80}") from None
    return rows


def _cells(picture: Picture, grid: tuple[int, int] | None) -> Iterator[Picture]:
    """The picture itself, or the cells of its grid row by row."""
    width, height = picture.load().size
    if grid is None:
        yield picture
        return
    rows, columns = grid
    if width % columns or height % rows:
        raise ConfigError(
            f"--grid {rows}x{columns} (rows x columns) must divide the picture, but {str(picture.path)!r} is "
            f"{width} x {height} px"
        )
    cell_width, cell_height = width // columns, height // rows
    for y in range(0, height, cell_height):
        for x in range(0, width, cell_width):
            box = (x, y, x + cell_width, y + cell_height)
            yield replace(picture, box=box)


def save_png(path: Path, image: Image.Image, text: dict[str, str], following: Sequence[Image.Image] = ()) -> None:
    """Write a PNG file with text chunks, whole or not at all; with `following` frames an animated one, a video."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    duration_ms = 1000 / FRAME_RATE
    with written(path) as partial:
        image.save(partial, "PNG", pnginfo=info, save_all=True, append_images=following, duration=duration_ms)


def read_png_text(path: Path) -> dict[str, str]:
    """The text chunks of a PNG file by keyword; empty for a file that is none."""
    try:
        with opened(path, "image") as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except UserError:
        return {}
