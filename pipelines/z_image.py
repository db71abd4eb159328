"""Z-Image and Z-Image-Turbo with an adapter of ngrpo-lora, drawn as in training.

pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="pipelines/z_image.py", trust_remote_code=True)
"""

from diffusers import ZImageImg2ImgPipeline, ZImagePipeline

from .neighbor_grpo import NeighborGRPOMixin
from .scheduling_flow_dpm import FlowDPMSolverMultistepScheduler


class NeighborGRPOZImagePipeline(NeighborGRPOMixin, ZImagePipeline):
    """diffusers' `ZImagePipeline` with what `NeighborGRPOMixin` adds."""

    scheduler_class = FlowDPMSolverMultistepScheduler
    from_image_class = ZImageImg2ImgPipeline
    unguided = 0.0

    def _default_side(self) -> int:
        return 1024
