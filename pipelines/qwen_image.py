"""Qwen-Image with an adapter of ngrpo-lora, drawn as in training.

pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="pipelines/qwen_image.py", trust_remote_code=True)
"""

from diffusers import QwenImageImg2ImgPipeline, QwenImagePipeline

from .neighbor_grpo import NeighborGRPOMixin
from .scheduling_flow_dpm import FlowDPMSolverMultistepScheduler


class NeighborGRPOQwenImagePipeline(NeighborGRPOMixin, QwenImagePipeline):
    """diffusers' `QwenImagePipeline` with what `NeighborGRPOMixin` adds."""

    scheduler_class = FlowDPMSolverMultistepScheduler
    from_image_class = QwenImageImg2ImgPipeline
    guided_by = "true_cfg_scale"
    packs_latents = True
