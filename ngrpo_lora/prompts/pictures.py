"""Source pictures: what a prompt of an editing model edits, checked before a model loads.

A picture is a file of one of `FORMATS`, or the bytes of one in a dataset. It is used as people see it
(`records.pictures.as_seen`): turned as its EXIF data say, its transparent parts on white, in 8-bit RGB. Refused are
files that are missing, empty, broken or no pictures, sides below `MIN_SIDE_PX`, more than `MAX_PIXELS`, several
frames, and numbers without a known white (32-bit and floating-point pixels).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from PIL import Image, ImageOps, UnidentifiedImageError

from ngrpo_lora.errors import ConfigError, UserError, first_line
from ngrpo_lora.records.files import digest
from ngrpo_lora.records.pictures import NoWhite, as_seen, read_png_text

__all__ = [
    "SourcePicture",
    "find_picture",
    "is_picture_column",
    "read_source",
    "recorded_source",
    "sole_column",
    "take_pictures",
]

COLUMNS = ("source", "mask")
FILE_URL = "file://"
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MIN_SIDE_PX = 32
MAX_PIXELS = 2**26  # 8192 x 8192; what is larger may be a bomb: a small file that fills the memory
OPENING = threading.Lock()  # what is warned of is a setting of all threads
ONE_OF_SEVERAL = ("MPO",)  # photographs of phones: the frames after the first are previews and depth maps


@dataclass(frozen=True)
class SourcePicture:
    """A picture that a prompt edits.

    content: the file, or the bytes of one. name: what the prompts call it. place: where they do, for messages.
    """

    content: Path | bytes
    name: str
    place: str = field(compare=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's bytes, by which equal pictures are known.

        Raises:
            ConfigError: it cannot be read.
        """
        return hashlib.sha256(self.read()).hexdigest()

    @property
    def origin(self) -> str:
        """What tells it from the others of a file or dataset: its file's name there, or the digest of its bytes."""
        return self.name if isinstance(self.content, Path) else self.digest

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            ConfigError: there is no such file, it is a folder, a pipe or empty, or it cannot be read.
        """
        data = self.content
        if isinstance(data, Path):
            if os.path.exists(data) and not os.path.isfile(data):
                raise self.refused("is a folder, a pipe or a device; name a file")
            try:
                data = data.read_bytes()
            except FileNotFoundError:
                is_web = "://" in self.name and not self.name.startswith("file:")
                remedy = "download it, and name the file" if is_web else "correct the path"
                raise self.refused(f"is no file ({os.path.abspath(data)!r}); {remedy}") from None
            except (OSError, ValueError) as error:
                raise self.refused(f"cannot be read ({first_line(error)}); correct the path or its rights") from None
        if not data:
            raise self.refused("is empty; save it anew")
        return data

    def load(self) -> Image.Image:
        """The picture as people see it, in 8-bit RGB; transparent parts are put on white.

        Raises:
            ConfigError: as `read`, or it is no picture, or one of those that the head of this module refuses.
        """
        data = self.read()
        try:
            with OPENING, warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # too large is told below
                file = Image.open(io.BytesIO(data), formats=FORMATS)
            with file:
                self.check(file)
                return as_seen(file)
        except ConfigError:
            raise
        except NoWhite as error:
            raise self.refused(str(error)) from None
        except UnidentifiedImageError:
            raise self.refused("is no picture of a known format; save it as PNG, JPEG or WebP") from None
        except Image.DecompressionBombError:
            raise self.refused(f"has more than {MAX_PIXELS:,} pixels; make it smaller") from None
        except Exception as error:  # Pillow has many kinds for a broken file
            raise self.refused(f"is broken ({first_line(error)}); save it anew") from None

    def fitted(self, width_px: int, height_px: int) -> Image.Image:
        """The picture at the size of what is drawn: scaled to cover it, and the middle cut out; raises as `load`."""
        return ImageOps.fit(self.load(), (width_px, height_px), Image.Resampling.LANCZOS)

    def check(self, file: Image.Image) -> None:
        """Refuse by its header what `load` does not take; raises ConfigError."""
        width, height = file.size
        if min(width, height) < MIN_SIDE_PX:
            raise self.refused(f"is {width} x {height} px, below {MIN_SIDE_PX} px a side; give a larger one")
        if width * height > MAX_PIXELS:
            raise self.refused(f"is {width} x {height} px, more than {MAX_PIXELS:,} pixels; make it smaller")
        frames = getattr(file, "n_frames", 1)
        if frames > 1 and file.format not in ONE_OF_SEVERAL:
            raise self.refused(f"has {frames} frames or pages; save the one to be edited as a picture of its own")

    def refused(self, why: str) -> ConfigError:
        """The error for this picture: rule, value with its place, and what is wrong with what remedy."""
        if self.place.startswith("--"):  # an option that names this one picture
            return ConfigError(f"{self.place} must be a readable picture, but {self.name!r} {why}")
        return ConfigError(f"must have readable source pictures, but {self.name!r} ({self.place}) {why}")


def is_picture_column(name: str) -> bool:
    """Whether a column holds pictures of edits: `source` or `mask`, in any case."""
    return name.strip().casefold() in COLUMNS


def sole_column(names: Iterable[str], known: str, place: str, remedy: str = "rename one of them") -> str | None:
    """The name of a row's column that means `known`, in any case; None where there is none.

    Args:
        place: where the row stands, for messages.
        remedy: what to do about several; `{}` stands for the first of them.
    Raises:
        ConfigError: several columns mean it.
    """
    found = [name for name in names if name.strip().casefold() == known]
    if len(found) > 1:
        said, remedy = " and ".join(map(repr, found)), remedy.format(found[0].strip())
        raise ConfigError(f"must have one column {known}, but {place} has {said}; {remedy}")
    return found[0] if found else None


def take_pictures(metadata: dict[str, Any], folder: Path, place: str) -> dict[str, SourcePicture]:
    """The pictures of a row by what they are, `source` or `mask`; in its metadata their names take their place.

    Args:
        folder: what a relative path counts from.
        place: where the row stands, for messages.
    Raises:
        ConfigError: two columns are of one name but for its case.
    """
    found: dict[str, SourcePicture] = {}
    for known in COLUMNS:
        column = sole_column(metadata, known, place)
        picture = None if column is None else find_picture(metadata[column], folder, place)
        if column is not None and picture is not None:
            metadata[column] = picture.name
            found[known] = picture
    return found


def find_picture(value: Any, folder: Path, place: str) -> SourcePicture | None:
    """The picture that a cell of a picture column means, or None where it means none.

    That is the bytes of a file, as datasets have them, or text: a `file://` URL, the name of a file that is there, or
    one with the ending of a picture; `~` is the user's own folder. Other text is metadata, such as where a caption is
    from.

    Args:
        folder: what a relative path counts from.
        place: where the cell stands, for messages.
    """
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:  # as `datasets` keeps pictures
        data, name = value.get("bytes"), value.get("path")
        name = name if isinstance(name, str) else ""
        if not isinstance(data, bytes):  # JSON has none
            return find_picture(name, folder, place)
        return SourcePicture(data, name or "bytes", place)
    if isinstance(value, bytes):
        return SourcePicture(value, "bytes", place)
    if not isinstance(value, str) or not value.strip():
        return None
    text = value.strip()
    host, slash, rest = text[len(FILE_URL) :].partition("/")
    is_url = text.lower().startswith(FILE_URL) and host in ("", "localhost")
    path = Path(url2pathname(slash + rest)) if is_url else folder / os.path.expanduser(text)
    named_so = Image.registered_extensions().get(path.suffix.lower()) in FORMATS
    return SourcePicture(path, value, place) if is_url or named_so or os.path.isfile(path) else None


def recorded_source(path: Path, remedy: str) -> SourcePicture | None:
    """The picture that the PNG file `path` was edited from, as `ngrpo sample` wrote into it; None where it did not.

    Raises:
        UserError: as `read_source`.
    """
    try:
        edited = json.loads(read_png_text(path)["ngrpo"])["source"]
        source = edited["name"], edited["file"], edited["sha256"]
    except (ValueError, KeyError, TypeError):
        return None
    return read_source(path, *source, remedy)


def read_source(path: Path, name: str, file: str | None, sha256: str, remedy: str) -> SourcePicture:
    """The picture that the picture `path` was edited from.

    Args:
        name, file, sha256: what was written down of it.
        remedy: how to give it, for messages.
    Raises:
        UserError: it is gone, has changed, or never was a file of its own.
    """
    if file is None:
        raise UserError(f"{str(path)!r} was edited from {name!r}, a picture within a dataset; {remedy}")
    if not Path(file).is_file() or digest(Path(file)) != sha256:
        what = "has changed since" if Path(file).is_file() else "is not there any more"
        raise UserError(f"{str(path)!r} was edited from {file!r}, which {what}; {remedy}")
    return SourcePicture(Path(file), name, str(path))
