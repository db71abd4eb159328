"""Motion in videos whose displacement is known, and what must not pass for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from ngrpo_lora.cli import app
from ngrpo_lora.errors import UserError
from ngrpo_lora.records.pictures import save_png
from ngrpo_lora.rewards.motion import Config, Reward

HEIGHT, WIDTH, FRAMES = 72, 128, 9
RANDOM = np.random.default_rng(0)


def texture(seed: int = 0) -> np.ndarray:
    """Soft random blotches, (3 H, 3 W), of which a frame shows a part."""
    noise = np.random.default_rng(seed).integers(0, 256, (3 * HEIGHT, 3 * WIDTH), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)), float)
    return np.clip((blurred - blurred.mean()) / blurred.std() * 45 + 128, 0, 255)


def video(frame: Callable[[int], np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(np.clip(frame(i), 0, 255).astype(np.uint8)).convert("RGB") for i in range(FRAMES)]


def seen(x: int, y: int = 0, seed: int = 0) -> np.ndarray:
    """A frame of the texture, x and y px to the right of and below its middle."""
    return texture(seed)[HEIGHT + y : 2 * HEIGHT + y, WIDTH + x : 2 * WIDTH + x]


def score(frames: list[Image.Image], **settings: float | bool) -> float:
    return Reward(Config(name="motion", full_motion=0.05, **settings), "cpu")(frames)  # pyright: ignore[reportArgumentType]


def object_on(background: Callable[[int], np.ndarray], x: Callable[[int], int]) -> list[Image.Image]:
    """A textured square of 32 px that is at `x(i)` px in frame i, before a background."""

    def frame(i: int) -> np.ndarray:
        image = background(i).copy()
        image[20:52, 40 + x(i) : 72 + x(i)] = seen(0, seed=1)[20:52, 40:72]
        return image

    return video(frame)


def test_a_still_video_has_none():
    assert score(video(lambda i: seen(0))) == 0.0
    assert score(video(lambda i: np.full((HEIGHT, WIDTH), 90.0))) == 0.0


@pytest.mark.parametrize(("x", "y"), [(1, 0), (2, 0), (0, -2), (1, 1)])
def test_the_score_is_the_share_of_the_shorter_side_that_all_moves_by(x: int, y: int):
    """To the pixel, as all of the picture moves by the same."""
    assert score(video(lambda i: seen(x * i, y * i))) == pytest.approx(np.hypot(x, y) / HEIGHT / 0.05, rel=0.03)


def test_it_is_the_same_of_a_larger_video():
    large = [frame.resize((4 * WIDTH, 4 * HEIGHT), Image.Resampling.NEAREST) for frame in video(lambda i: seen(i))]
    assert score(large) == pytest.approx(score(video(lambda i: seen(i))), rel=0.01)


def test_an_object_that_moves_counts_by_its_size_and_more_motion_pays_no_more():
    still, slow, fast = (object_on(lambda i: seen(0), lambda i, v=v: v * i) for v in (0, 1, 2))
    assert 0 == score(still) < score(slow) < score(fast) < score(video(lambda i: seen(2 * i)))
    assert Reward(Config(name="motion"), "cpu")(video(lambda i: seen(2 * i))) == 1.0


NOISE = {i: RANDOM.normal(0, 60, (HEIGHT, WIDTH)) for i in range(FRAMES)}
FALSE = {
    "noise alone": lambda i: 128 + NOISE[i],
    "noise on a still picture": lambda i: seen(0) + NOISE[i],
    "grain": lambda i: seen(0) + 0.2 * NOISE[i],
    "flicker of the light": lambda i: seen(0) * (0.6 + 0.4 * (i % 2)),
    "flashes": lambda i: seen(0) + 100 * (i % 4 == 0),
    "light that grows": lambda i: seen(0) * (0.5 + i / 20),
    "a cut at every frame": lambda i: seen(0, seed=i),
    "two pictures in turns": lambda i: seen(0, seed=i % 2),
    "a dissolve": lambda i: seen(0) * (1 - i / 8) + seen(0, seed=1) * i / 8,
    "shaking to and fro": lambda i: seen(2 * (i % 2)),
    "shaking in a circle": lambda i: seen(*[(0, 0), (3, 0), (3, 3), (0, 3)][i % 4]),
    "stripes that flicker": lambda i: np.tile(128 + 100 * np.cos(np.arange(WIDTH) + np.pi * i), (HEIGHT, 1)),
}


@pytest.mark.parametrize("frame", FALSE.values(), ids=FALSE)
def test_what_is_no_motion_has_less_than_the_slowest_that_is_seen(frame: Callable[[int], np.ndarray]):
    slowest = score(video(lambda i: seen(i // 4)))
    assert score(video(frame)) <= 0.1 * slowest


def test_a_pan_may_be_ignored_and_what_moves_in_it_not():
    pan = video(lambda i: seen(i))
    assert score(pan) > 0.25
    assert score(pan, ignore_pan=True) <= 0.02
    moving = object_on(lambda i: seen(i), lambda i: 2 * i)
    assert score(moving, ignore_pan=True) > 0.03
    before_still = object_on(lambda i: seen(0), lambda i: 2 * i)
    assert score(before_still, ignore_pan=True) == score(before_still)


@pytest.mark.parametrize("count", [2, 3, 5, 33])
def test_videos_of_every_length_are_scored(count: int):
    frames = [Image.fromarray(seen(2 * i).astype(np.uint8)) for i in range(count)]
    assert score(frames) == pytest.approx(2 / HEIGHT / 0.05, rel=0.03)


def test_videos_on_disk_are_scored_by_the_command(tmp_path: Path):
    """As `ngrpo sample` writes them; a reward of pictures beside it sees the middle frame of each."""
    for name, step in (("still", 0), ("moving", 2)):
        # Pillow drops frames that are quite alike.
        first, *following = video(lambda i, step=step: seen(step * i) + 0.05 * NOISE[i])
        save_png(tmp_path / f"{name}.png", first, {}, following)
    command = ["score", str(tmp_path), "-r", "motion", "-r", "jpeg", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["pictures"]
    assert {Path(row["picture"]).stem: row["motion"] for row in rows} == {"still": 0.0, "moving": 1.0}
    assert len({row["jpeg"] for row in rows}) == 2
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    result = CliRunner().invoke(
        app, ["score", str(tmp_path / "picture.png"), "-r", "motion", "--output", str(tmp_path / "out")]
    )
    assert result.exit_code == 2
    assert "reward motion needs a video of two frames or more, got a single picture" in result.stderr


def test_a_picture_is_no_video():
    with pytest.raises(UserError, match="reward motion needs a video of two frames or more, got a single picture"):
        score(video(lambda i: seen(0))[:1])
