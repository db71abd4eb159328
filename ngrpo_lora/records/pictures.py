"""Reads pictures and their prompts from files, folders and grids, and writes PNG files that hold their prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo

from ngrpo_lora.errors import ConfigError, UserError
from ngrpo_lora.records.files import written
from ngrpo_lora.records.texts import decoded, parse_json

__all__ = ["Picture", "collect", "read_png_text", "save_png"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)  # of Pillow, for bad files
VIDEOS = ("PNG", "WEBP")  # other formats keep thumbnails and depth maps as further frames
FRAME_RATE = 16  # per second


@dataclass(frozen=True)
class Picture:
    """A picture file, or a cell of one, with its prompt and the other metadata of its folder's metadata.jsonl."""

    path: Path
    prompt: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    box: tuple[int, int, int, int] | None = None
    """The cell's left, upper, right and lower edge in pixels; None is the whole file."""

    @property
    def name(self) -> str:
        """The file's path, followed for a cell by its upper left corner in pixels: `grid.png#64,0`."""
        return str(self.path) if self.box is None else f"{self.path}#{self.box[0]},{self.box[1]}"

    def load(self) -> Image.Image:
        """The pixels as an upright RGB image; of a video its middle frame.

        Raises:
            UserError: not an image, or a damaged one.
        """
        try:
            with Image.open(self.path) as file:
                if file.format in VIDEOS:
                    file.seek(getattr(file, "n_frames", 1) // 2)
                image = ImageOps.exif_transpose(file).convert("RGB")
        except UNREADABLE as error:
            raise UserError(f"{str(self.path)!r} must be a readable image, but it is not: {error}") from None
        return image if self.box is None else image.crop(self.box)

    def frames(self) -> list[Image.Image]:
        """All frames of a video, of each the part that `load` gives of the middle one; of a picture itself alone.

        Raises:
            UserError: as `load`.
        """
        try:
            with Image.open(self.path) as file:
                if file.format not in VIDEOS or getattr(file, "n_frames", 1) == 1:
                    return [self.load()]
                frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
        except UNREADABLE as error:
            raise UserError(f"{str(self.path)!r} must be a readable video, but it is not: {error}") from None
        return frames if self.box is None else [frame.crop(self.box) for frame in frames]


def collect(sources: Sequence[Path], prompt: str | None = None, grid: tuple[int, int] | None = None) -> list[Picture]:
    """The pictures of files and folders, in order; each is read once, so that a bad one is reported at once.

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
            if not found:
                raise ConfigError(f"SOURCE must hold pictures ({', '.join(SUFFIXES)}), but {str(source)!r} has none")
            yield from found
        elif source.is_file():
            yield source
        else:
            raise ConfigError(f"SOURCE must be a picture, a folder of them, or a run, but {str(source)!r} is not there")


def _described(path: Path, folder: dict[str, dict[str, Any]], prompt: str | None) -> Picture:
    metadata = dict(folder.get(path.name, {}))
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
    return Picture(path, prompt or None, metadata)


def _folder_metadata(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of `metadata.jsonl` by file name, as Hugging Face's image folders have them."""
    path = folder / "metadata.jsonl"
    rows: dict[str, dict[str, Any]] = {}
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
                rows[row.pop("file_name")] = row
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
            yield Picture(picture.path, picture.prompt, picture.metadata, box)


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
        with Image.open(path) as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except UNREADABLE:
        return {}
