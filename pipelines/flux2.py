"""FLUX.2-dev with an adapter of ngrpo-lora, drawn as in training; it edits `image` where there is one.

pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="pipelines/flux2.py", trust_remote_code=True)

The base's processor needs torchvision.
"""

from diffusers import Flux2Pipeline

from .flux2_drawing import Flux2Drawing
from .neighbor_grpo import NeighborGRPOMixin
from .scheduling_flow_dpm import FlowDPMSolverMultistepScheduler


class NeighborGRPOFlux2Pipeline(Flux2Drawing, NeighborGRPOMixin, Flux2Pipeline):
    """diffusers' `Flux2Pipeline` with what `NeighborGRPOMixin` adds."""

    scheduler_class = FlowDPMSolverMultistepScheduler
    unguided = None
