import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from ngrpo_lora.rewards._clip import to_pixels

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
SIZES = [
    (640, 480),
    (480, 640),
    (224, 224),
    (224, 160),
    (301, 100),
    (100, 301),
    (333, 334),
    (512, 512),
    (30, 17),
    (3, 90),
]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with sharp edges and noise: each rounding rule leaves its mark somewhere."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) % 64 * 4], -1)
    smooth[height // 3 : height // 2] = 255
    noisy = smooth + rng.normal(0, 20, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def bicubic(samples: int, pixels: int) -> np.ndarray:
    """(samples, pixels) matrix of the antialiased cubic filter with a = -0.5 (Keys 1981)."""
    step = pixels / samples
    centre = (np.arange(samples)[:, None] + 0.5) * step
    x = np.abs(np.arange(pixels) + 0.5 - centre) / max(step, 1)
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return weights / weights.sum(1, keepdims=True)


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float64).transpose(2, 0, 1) / 255


def eight_bit(array: np.ndarray) -> np.ndarray:
    return np.round(array.clip(0, 1) * 255) / 255


def resized(array: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """As PIL resizes, each pass to 8 bits: rows first, or columns first, which newer versions prefer if it is less."""
    across, down = bicubic(width, array.shape[2]).T, bicubic(height, array.shape[1])
    return [eight_bit(down @ eight_bit(array @ across)), eight_bit(eight_bit(down @ array) @ across)]


def assert_equal_up_to_ties(pixels: torch.Tensor, expected: list[np.ndarray]) -> None:
    """PIL multiplies in fixed point: where a sum falls on a half, a pass may go to the next of 255 levels."""
    errors = [255 * np.abs(pixels.numpy() * STD + MEAN - one) for one in expected]
    nearest = min(errors, key=np.mean)
    assert nearest.max() < 2.01
    assert nearest.mean() < 0.005


@pytest.mark.parametrize(
    ("size", "mode"), [(size, "RGB") for size in SIZES] + [((301, 100), m) for m in ("RGBA", "L", "P")]
)
def test_crop_is_that_of_transformers(size, mode):
    image = picture(*size, mode)
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
    expected = torch.from_numpy(processor(image, return_tensors="np")["pixel_values"][0])
    torch.testing.assert_close(to_pixels(image, 224, "crop"), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_crop_is_the_middle_of_a_bicubic_resize(size):
    image = picture(*size)
    width, height = (int(224 * side / min(size)) for side in size)
    left, top = (width - 224) // 2, (height - 224) // 2
    expected = [one[:, top : top + 224, left : left + 224] for one in resized(levels(image), height, width)]
    assert_equal_up_to_ties(to_pixels(image, 224, "crop"), expected)


@pytest.mark.parametrize("size", SIZES)
def test_squash_shows_all_of_the_image_as_a_square(size):
    image = picture(*size)
    assert_equal_up_to_ties(to_pixels(image, 378, "squash"), resized(levels(image), 378, 378))


@pytest.mark.parametrize("size", SIZES)
def test_letterbox_is_a_bicubic_resize_of_floats_with_black_around_it(size):
    width, height = (round(side * 224 / max(size)) for side in size)
    left, top = (224 - width) // 2, (224 - height) // 2
    expected = np.zeros((3, 224, 224))
    image = levels(picture(*size))
    expected[:, top : top + height, left : left + width] = (
        bicubic(height, image.shape[1]) @ image @ bicubic(width, image.shape[2]).T
    )
    np.testing.assert_allclose(to_pixels(picture(*size), 224, "letterbox"), (expected - MEAN) / STD, atol=1e-4)


def test_a_line_of_pixels_can_be_letterboxed():
    assert to_pixels(picture(1000, 1), 224, "letterbox").shape == (3, 224, 224)


def test_the_three_ways_differ_only_on_images_that_are_not_square():
    ways = ("crop", "letterbox", "squash")
    square = [to_pixels(picture(500, 500), 224, way) for way in ways]
    wide = [to_pixels(picture(500, 300), 224, way) for way in ways]
    torch.testing.assert_close(square[0], square[2], atol=0, rtol=0)
    assert (square[0] - square[1]).abs().mean() < 0.01  # 8 bits against floats
    assert min((a - b).abs().mean() for a, b in zip(wide, wide[1:] + wide[:1], strict=True)) > 0.1
