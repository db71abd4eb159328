"""Stable Diffusion 3.5 and 3 with an adapter of ngrpo-lora, drawn as in training.

pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="pipelines/sd3.py", trust_remote_code=True)
"""

from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline

from .neighbor_grpo import NeighborGRPOMixin
from .scheduling_flow_dpm import FlowDPMSolverMultistepScheduler


class NeighborGRPOStableDiffusion3Pipeline(NeighborGRPOMixin, StableDiffusion3Pipeline):
    """diffusers' `StableDiffusion3Pipeline` with what `NeighborGRPOMixin` adds."""

    scheduler_class = FlowDPMSolverMultistepScheduler
    from_image_class = StableDiffusion3Img2ImgPipeline
