"""FLUX.1 (dev, schnell, Krea) with an adapter of ngrpo-lora, drawn as in training.

pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="pipelines/flux.py", trust_remote_code=True)
"""

from diffusers import FluxImg2ImgPipeline, FluxPipeline

from .neighbor_grpo import NeighborGRPOMixin
from .scheduling_flow_dpm import FlowDPMSolverMultistepScheduler


class NeighborGRPOFluxPipeline(NeighborGRPOMixin, FluxPipeline):
    """diffusers' `FluxPipeline` with what `NeighborGRPOMixin` adds."""

    scheduler_class = FlowDPMSolverMultistepScheduler
    from_image_class = FluxImg2ImgPipeline
    unguided = None
    packs_latents = True
