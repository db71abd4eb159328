"""CLIP score, how well an image fits its prompt: the cosine of their CLIP embeddings.

Source: CLIPScore (arXiv 2104.08718) without its factor 2.5 and its floor at 0, so in [-1, 1]. The default network is
OpenAI's ViT-L/14, which `aesthetic` shares: MIT, 428 M parameters, 0.9 GB of memory in float16.

The Neighbor GRPO paper's scores, 0.36 to 0.39, fit MixGRPO's network (inferred, the paper does not name it):

    {name: clip_score, path: apple/DFN5B-CLIP-ViT-H-14-378}

Its licence, apple-amlr, allows research only; 987 M parameters, 2.0 GB in float16. Its images are squashed to a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from PIL import Image
from torch import Tensor

from ngrpo_lora.config.rewards.clip_score import Config
from ngrpo_lora.rewards._clip import load_clip


class Reward:
    """CLIP score: the cosine of each image with its prompt, (B,) float32 in [-1, 1]."""

    def __init__(self, config: Config, device: str):
        self.clip = load_clip(config, device)
        self.resize: Literal["crop", "squash"] = resize_of(config)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(B,) float32, the cosine of each image with its prompt."""
        return self.clip.cosines(images, prompts, self.resize)


def resize_of(config: Config) -> Literal["crop", "squash"]:
    """How wide and tall images are made square, with `auto` decided."""
    of_path = "squash" if "DFN" in config.path else "crop"
    return of_path if config.resize == "auto" else config.resize
