"""What every family must show whose videos start from a picture, by `ngrpo sample`."""

from __future__ import annotations

import json
from pathlib import Path

from commands import run
from PIL import Image, ImageSequence


def frames_of(path: str | Path) -> list[bytes]:
    """The pixels of each frame of an animated PNG."""
    with Image.open(path) as file:
        return [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(file)]


def check_sampled_videos(
    adapter: Path, sources: Path, prompts: Path, output: Path, size: tuple[int, int]
) -> list[bytes]:
    """A video of five frames says what it starts from, `--like` draws it again, and sizes that are given are drawn.

    Args:
        sources: the folder of 0.png and 1.png. prompts: a table of them.
        size: (width, height) in pixels of a video from 0.png.
    Returns:
        The frames of a video from 0.png.
    """
    source, two = sources / "0.png", ("sample", "--adapter", adapter, "--steps", 2, "--output")
    (first,) = run(*two, output / "first", "--prompt", "a red star", "--source", source)
    with Image.open(first) as file:
        assert file.size == size
        assert json.loads(file.text["ngrpo"])["source"]["name"] == str(source)  # pyright: ignore[reportAttributeAccessIssue]
    drawn = frames_of(first)
    assert len(drawn) == 5
    for words, alike in (([], True), (["--source", sources / "1.png"], False)):
        (again,) = run(*two, output / "again", "--like", first, *words)
        assert (frames_of(again) == drawn) == alike
    sides = ("--height", 32, "--width", 32)
    sized = run(*two, output / "sized", "--prompts", prompts, "--num-prompts", 2, *sides)
    assert [(Image.open(path).size, len(frames_of(path))) for path in sized] == [((32, 32), 5)] * 2
    return drawn
