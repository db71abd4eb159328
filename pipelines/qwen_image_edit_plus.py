"""Qwen-Image-Edit-2509 or 2511 with an adapter of ngrpo-lora, which edits `image` as in training.

pipe = DiffusionPipeline.from_pretrained(
    base, custom_pipeline="pipelines/qwen_image_edit_plus.py", trust_remote_code=True
)

The base's processor needs torchvision.
"""

from diffusers import QwenImageEditPlusPipeline

from .neighbor_grpo import NeighborGRPOMixin
from .qwen_editing import QwenEditing
from .scheduling_flow_dpm import FlowDPMSolverMultistepScheduler


class NeighborGRPOQwenImageEditPlusPipeline(QwenEditing, NeighborGRPOMixin, QwenImageEditPlusPipeline):
    """diffusers' `QwenImageEditPlusPipeline` with what `NeighborGRPOMixin` adds."""

    scheduler_class = FlowDPMSolverMultistepScheduler
