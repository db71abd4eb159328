"""HPSv2.1, how much people prefer an image for a prompt: the cosine of a CLIP ViT-H/14 tuned on their choices.

Source: Human Preference Score v2 (arXiv 2306.09341), package hpsv2 1.2.0, file `HPS_v2.1_compressed.pt`. The cosine as
it is, without the logit scale, in [-1, 1]; 0.31 to 0.38 in the Neighbor GRPO paper. The image is letterboxed: not
cropped, its longer side at 224 pixels, black around it. The prompt is cut at 77 tokens.
Weights: Apache-2.0; 986 M parameters, 2.0 GB of memory in float16.

Departures: non-square images whose longer side is 224 already are padded too (the package does not, and fails); of
ftfy's repairs to a prompt only HTML entities and curly quotes are done.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ngrpo_lora.config.rewards.hpsv2 import FILE, Config
from ngrpo_lora.rewards._clip import load_clip

STRAIGHT = str.maketrans({**dict.fromkeys("ʼ‘’‚‛", "'"), **dict.fromkeys("“”„‟", '"')})


class Reward:
    """HPSv2.1: the cosine of each image with its prompt, (B,) float32 in [-1, 1]."""

    def __init__(self, config: Config, device: str):
        self.clip = load_clip(config, device, filename=FILE)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(B,) float32, the cosine of each image with its prompt."""
        return self.clip.cosines(images, [clean(prompt) for prompt in prompts], resize="letterbox")


def clean(prompt: str) -> str:
    """A prompt as open_clip's tokenizer reads it: HTML entities resolved, twice, and quotes straight."""
    return html.unescape(html.unescape(prompt)).translate(STRAIGHT)
