"""What the pipelines of Qwen-Image's models that edit have in common."""

import math
from typing import Any

from .neighbor_grpo import NeighborGRPOMixin


class QwenEditing(NeighborGRPOMixin):
    """`NeighborGRPOMixin` for the stock pipelines of Qwen-Image-Edit."""

    guided_by = "true_cfg_scale"
    packs_latents = True
    edits = True

    def edited_size(self, source: Any, area: int) -> tuple[int, int]:
        """(height, width): of a source's aspect, at most 16 to 1, and an area in pixels, as diffusers rounds it."""
        width, height = rounded_sides(area, min(max(source.width / source.height, 1 / 16), 16))
        return height, width

    def source_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height): about 1024 x 1024 pixels in the shape of what is drawn, which diffusers keeps as it is."""
        size = rounded_sides(1024 * 1024, width / height)
        while (again := rounded_sides(1024 * 1024, size[0] / size[1])) != size:
            size = again
        return size

    def encode_prompt(self, *args: Any, image: Any = None, max_sequence_length: int = 512, **call: Any) -> Any:
        """Encode as the stock pipeline does, which never cuts a text; here it is cut, as in training."""
        embeds, mask = super().encode_prompt(*args, image=image, max_sequence_length=max_sequence_length, **call)
        if call.get("prompt_embeds") is not None:
            return embeds, mask
        (seen,) = image if isinstance(image, list) else [image]
        patches = self.processor.image_processor
        picture = patches.get_number_of_image_patches(seen.height, seen.width) // patches.merge_size**2
        kept = slice(picture + max_sequence_length)
        return embeds[:, kept], None if mask is None else mask[:, kept]


def rounded_sides(area: int, aspect: float) -> tuple[int, int]:
    """(width, height) as diffusers rounds them to multiples of 32, of about an area and an aspect; at least 32."""
    width = math.sqrt(area * aspect)
    return max(round(width / 32) * 32, 32), max(round(width / aspect / 32) * 32, 32)
