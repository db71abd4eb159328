"""PickScore, how much people prefer an image for a prompt: the logit of a CLIP ViT-H/14 tuned on their choices.

Source: Pick-a-Pic (arXiv 2305.01569), `yuvalkirstain/PickScore_v1` with the processor of the CLIP network it started
from. exp(logit_scale) * cosine, about 20 to 24. No setting scales it, that is what `weight` does;
elsewhere one finds score / 26 (Flow-GRPO), (score - 18) / 8 (MixGRPO) and score / 100 (tables).
Weights: we found no licence for them (code: MIT); 986 M parameters, 2.0 GB of memory in float16.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ngrpo_lora.config.rewards.pickscore import Config
from ngrpo_lora.rewards._clip import load_clip


class Reward:
    """PickScore: exp(logit_scale) * cosine of each image with its prompt, (B,) float32."""

    def __init__(self, config: Config, device: str):
        self.clip = load_clip(config, device)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(B,) float32, the logit of each image for its prompt."""
        return self.clip.logit_scale * self.clip.cosines(images, prompts, resize="crop")
