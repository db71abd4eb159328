"""What the pipelines of FLUX.2 have in common."""

import math
from typing import Any

from .neighbor_grpo import NeighborGRPOMixin


class Flux2Drawing(NeighborGRPOMixin):
    """`NeighborGRPOMixin` for the stock pipelines of FLUX.2, which draw from words, and edit where there is `image`."""

    edits = True
    needs_image = False

    def edited_size(self, source: Any, area: int) -> tuple[int, int]:
        """(height, width): of a source's aspect, at most 6 to 1, and at most an area in pixels; at least 64 a side."""
        multiple, aspect = 2 * self.vae_scale_factor, min(max(source.height / source.width, 1 / 6), 6)
        height, width = (round(math.sqrt(part)) // multiple * multiple for part in (area * aspect, area / aspect))
        return max(height, 64), max(width, 64)

    def _latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape (1, C, H, W) of a picture's latents, each cell of which holds 2 x 2 cells of the VAE."""
        cell_px = 2 * self.vae_scale_factor
        return (1, self.transformer.config.in_channels, height // cell_px, width // cell_px)
