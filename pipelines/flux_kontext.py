"""FLUX.1-Kontext with an adapter of ngrpo-lora, which edits `image` as in training.

pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="pipelines/flux_kontext.py", trust_remote_code=True)
"""

import math
from typing import Any

from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

from .neighbor_grpo import NeighborGRPOMixin
from .scheduling_flow_dpm import FlowDPMSolverMultistepScheduler


class NeighborGRPOFluxKontextPipeline(NeighborGRPOMixin, FluxKontextPipeline):
    """diffusers' `FluxKontextPipeline` with what `NeighborGRPOMixin` adds."""

    scheduler_class = FlowDPMSolverMultistepScheduler
    unguided = None
    packs_latents = True
    edits = True

    def as_it_is(self, width: int, height: int) -> dict[str, Any]:
        """Arguments with which the stock pipeline takes a source of this size as it is."""
        return {"_auto_resize": False, "max_area": height * width}

    def edited_size(self, source: Any, area: int) -> tuple[int, int]:
        """(height, width): the one of Kontext's resolutions with the nearest aspect, scaled to an area in pixels."""
        aspect, multiple, scale = source.width / source.height, 2 * self.vae_scale_factor, math.sqrt(area) / 1024
        _, width, height = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        rows, columns = (max(1, round(side * scale / multiple)) for side in (height, width))
        return rows * multiple, columns * multiple
