"""Qwen-Image-Edit with an adapter of ngrpo-lora, which edits `image` as in training.

pipe = DiffusionPipeline.from_pretrained(
    base, custom_pipeline="pipelines/qwen_image_edit.py", trust_remote_code=True
)

The base's processor needs torchvision.
"""

from diffusers import QwenImageEditPipeline

from .neighbor_grpo import NeighborGRPOMixin
from .qwen_editing import QwenEditing
from .scheduling_flow_dpm import FlowDPMSolverMultistepScheduler


class NeighborGRPOQwenImageEditPipeline(QwenEditing, NeighborGRPOMixin, QwenImageEditPipeline):
    """diffusers' `QwenImageEditPipeline` with what `NeighborGRPOMixin` adds."""

    scheduler_class = FlowDPMSolverMultistepScheduler
