"""FLUX.2 klein with an adapter of ngrpo-lora, drawn as in training; it edits `image` where there is one.

pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="pipelines/flux2_klein.py", trust_remote_code=True)
"""

from typing import Any

from diffusers import Flux2KleinPipeline

from .flux2_drawing import Flux2Drawing
from .neighbor_grpo import NeighborGRPOMixin, Settings, prompt_count
from .scheduling_flow_dpm import FlowDPMSolverMultistepScheduler


class NeighborGRPOFlux2KleinPipeline(Flux2Drawing, NeighborGRPOMixin, Flux2KleinPipeline):
    """diffusers' `Flux2KleinPipeline` with what `NeighborGRPOMixin` adds."""

    scheduler_class = FlowDPMSolverMultistepScheduler

    def _defaults(self, settings: Settings, call: dict[str, Any]) -> dict[str, Any]:
        """An adapter's settings; the stock pipeline takes a negative prompt as its embeddings alone."""
        defaults = super()._defaults(settings, call)
        if text := defaults.pop("negative_prompt", ""):
            tokens = call.get("max_sequence_length", settings.max_sequence_length)
            embeds, _ = self.encode_prompt(prompt=text, max_sequence_length=tokens)
            defaults["negative_prompt_embeds"] = embeds.repeat(prompt_count(call), 1, 1)
        return defaults
