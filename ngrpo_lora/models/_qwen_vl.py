"""Reads a text that speaks of a picture for Qwen2.5-VL, as transformers' `Qwen2VLProcessor` does.

That class also has a part for videos, which cannot be made without torchvision; nothing of it is needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

__all__ = ["PICTURE", "PictureProcessor"]

PICTURE = "<|image_pad|>"
"""The token in whose place a picture stands, once for every token of the picture."""


class PictureProcessor:
    """A tokenizer with what cuts pictures into patches, in the place of a `Qwen2VLProcessor`."""

    def __init__(self, tokenizer: Any, image_processor: Qwen2VLImageProcessorPil):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def __call__(
        self, text: Sequence[str], images: list[Image.Image], padding: bool, return_tensors: str
    ) -> BatchFeature:
        """Tokens of one text (1, L) and patches of the one picture that it has a place for.

        Returns:
            `input_ids` and `attention_mask` (1, L), `pixel_values` (patches, values of one), `image_grid_thw` (1, 3).
        """
        patches = self.image_processor(images, return_tensors=return_tensors)
        ((_, rows, columns),) = patches["image_grid_thw"].tolist()
        tokens = rows * columns // self.image_processor.merge_size**2
        whole = [one.replace(PICTURE, PICTURE * tokens, 1) for one in text]
        return BatchFeature({**self.tokenizer(whole, padding=padding, return_tensors=return_tensors), **patches})

    def picture_tokens(self, width_px: int, height_px: int) -> int:
        """Number of tokens that a picture of this size becomes."""
        patches = self.image_processor.get_number_of_image_patches(height_px, width_px)
        return patches // self.image_processor.merge_size**2
