"""Motion, how much moves in a video: 0 where it is still, 1 where blocks travel `full_motion` a frame in the mean.

Frames four apart are compared, grey and with a shorter side of 72 px. A block of 8 x 8 px has moved to where it is
found again: by the correlation of mean-free blocks, which must be 0.8 or more and 0.05 above that of the place where it
was; and three of the eight blocks around it must have gone the same way, to a pixel. Its displacement counts as a share
of the shorter side and frame, in the mean over all blocks and up to eight pairs of frames, and that mean is divided by
`full_motion` and held at 1.

What pays nothing: flicker (brightness and contrast drop out of the correlation), noise, cuts and dissolves (nothing is
found again), shaking to and fro (four frames later all is where it was), plain areas, which have no texture to follow,
and more motion than `full_motion`. What is faster than 2.8% of the shorter side a frame is not found again, and what is
slower than 0.2% counts as still. What does pay, and may be learned: sliding a still picture (`ignore_pan: true` takes
the blocks' median displacement off), zooms, and moving textures such as water. Motion says nothing of whether it is
what the prompt asks for: weigh it against rewards that do.

It sees all frames of a video, whatever `rewards.frames` says. No network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from pydantic import Field

from ngrpo_lora.config import RewardConfig
from ngrpo_lora.errors import UserError

SIDE_PX, BLOCK_PX, REACH_PX = 72, 8, 8
APART, MAX_PAIRS = 4, 8  # frames
FOUND, BETTER = 0.8, 0.05  # correlations
COMPANY = 3  # blocks
MIN_TEXTURE = 2.0  # standard deviation of a block's grey levels, of 255


class Config(RewardConfig, frozen=True):
    """Settings of motion."""

    full_motion: float = Field(
        default=0.01,
        gt=0,
        description="Mean displacement of all blocks, as a share of the shorter side and frame, that scores 1.",
    )
    ignore_pan: bool = Field(
        default=False, description="Take off the median displacement of the blocks, as of a camera that pans."
    )


class Reward:
    """Follows the blocks of each video."""

    def __init__(self, config: Config, device: str):
        self.config = config

    def __call__(self, video: Sequence[Image.Image]) -> float:
        """A score in [0, 1]; UserError for a single picture."""
        if len(video) < 2:
            raise UserError(f"reward {self.config.key} needs a video of two frames or more, got a single picture")
        apart = min(APART, len(video) - 1)
        moved = [self.displacement(*pair) for pair in pairs(video, apart)]
        return min(1.0, float(np.mean(moved)) / (SIDE_PX * apart * self.config.full_motion))

    def displacement(self, before: np.ndarray, after: np.ndarray) -> float:
        """Mean displacement in px of all blocks of one grey frame, (H, W), to another."""
        vectors, textured = displacements(before, after)
        if self.config.ignore_pan and textured.any():
            vectors = vectors - np.median(vectors[textured], 0)
        return float((np.hypot(*vectors.T) * textured).mean())


def pairs(video: Sequence[Image.Image], apart: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Up to MAX_PAIRS pairs of grey frames (H, W) float32 that are `apart` frames from each other, evenly spaced."""
    starts = np.linspace(0, len(video) - 1 - apart, min(MAX_PAIRS, len(video) - apart)).round().astype(int)
    scale = SIDE_PX / min(video[0].size)
    size = round(video[0].width * scale), round(video[0].height * scale)
    for start in starts.tolist():
        frames = (video[at].convert("L").resize(size, Image.Resampling.BOX) for at in (start, start + apart))
        before, after = (np.asarray(frame, np.float32) for frame in frames)
        yield before, after


def displacements(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the blocks of one grey frame, (H, W), have gone in another.

    Returns:
        (N, 2) displacements in px, 0 where a block is not found again elsewhere; (N,) bool, which blocks have texture.
    """
    inner = before[REACH_PX:-REACH_PX, REACH_PX:-REACH_PX]
    blocks, deviations = normalised(inner)
    windows = sliding_window_view(after, inner.shape)  # (2 R + 1, 2 R + 1, h, w)
    steps = range(-REACH_PX, REACH_PX + 1)
    shifts = np.array([(y, x) for y in steps for x in steps])
    found = np.stack([(blocks * normalised(windows[y, x])[0]).sum(1) for y, x in shifts + REACH_PX])  # (shifts, N)
    unmoved = found[len(shifts) // 2]
    best = found.argmax(0)
    textured = deviations >= MIN_TEXTURE
    has_moved = textured & (found.max(0) >= FOUND) & (found.max(0) - unmoved >= BETTER)
    vectors = shifts[best]
    together = in_company(vectors, has_moved, inner.shape[1] // BLOCK_PX)
    return vectors * together[:, None], textured


def in_company(vectors: np.ndarray, has_moved: np.ndarray, columns: int) -> np.ndarray:
    """Which blocks have moved as at least COMPANY of the eight around them, (N, 2) and (N,) bool -> (N,) bool."""
    vectors, has_moved = vectors.reshape(-1, columns, 2), has_moved.reshape(-1, columns)
    moved = np.pad(np.where(has_moved[..., None], vectors, np.inf), ((1, 1), (1, 1), (0, 0)), constant_values=np.inf)
    around = sliding_window_view(moved, (3, 3), (0, 1)).reshape(*has_moved.shape, 2, 9)
    alike = (np.abs(around - vectors[..., None]) <= 1).all(2).sum(2)  # the block itself is one of them
    return (has_moved & (alike > COMPANY)).ravel()


def normalised(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The whole blocks of an image, each with mean 0 and length 1, (N, 64); their standard deviations, (N,)."""
    rows, columns = (side // BLOCK_PX for side in image.shape)
    cut = image[: rows * BLOCK_PX, : columns * BLOCK_PX].reshape(rows, BLOCK_PX, columns, BLOCK_PX)
    blocks = cut.swapaxes(1, 2).reshape(rows * columns, BLOCK_PX**2)
    blocks = blocks - blocks.mean(1, keepdims=True)
    lengths = np.linalg.norm(blocks, axis=1)
    return blocks / np.maximum(lengths, 1e-6)[:, None], lengths / BLOCK_PX
