"""ImageReward: how much people prefer an image for a prompt, by a BLIP that reads both together.

Source: ImageReward (arXiv 2304.05977), package image-reward 1.5, file `ImageReward.pt`. The image is a ViT-L/16's 197
tokens; the prompt (35 tokens, padded) attends to them in a BERT, and the state of its first token, [CLS], is scored:

    (mlp(state) - 0.1672) / 1.0333,   mlp 768-1024-128-64-16-1 without activations

Unbounded; mean 0 and deviation 1 over the images it was trained on, mostly of Stable Diffusion 1.4.
The shorter side is brought to 224 pixels (bicubic) and the middle of the longer one is cut out.
Weights: Apache-2.0; 447 M parameters, 0.9 GB of memory in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ngrpo_lora.config.rewards.imagereward import FILE, Config
from ngrpo_lora.rewards._clip import read_weights, to_pixels, unreadable
from ngrpo_lora.rewards._placement import in_use, placement

MAX_TOKENS = 35


class Reward:
    """ImageReward's score of each image for its prompt, (B,) float32, unbounded."""

    def __init__(self, config: Config, device: str):
        from transformers import AutoTokenizer

        from ngrpo_lora.rewards._blip import from_checkpoint

        self.device, self.dtype = placement(config, device)
        self.offload = config.offload
        state = read_weights(config, "path", config.path, FILE)
        try:
            network: Any = from_checkpoint(state)  # transformers declares no usable `to`
        except (ValueError, RuntimeError) as error:
            raise unreadable(config, "path", config.path, f"ImageReward's weights ({FILE})", error) from error
        network.vision.to(self.dtype)
        network.text.to(self.dtype)  # the head stays float32
        self.network = network.eval().requires_grad_(False)
        self.size_px = network.size_px
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        except (OSError, ValueError, KeyError) as error:
            raise unreadable(config, "tokenizer", config.tokenizer, "BERT's tokenizer", error) from error
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's; here no prompt starts with them

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(B,) float32 on the CPU, the score of each image for its prompt."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        pixels = torch.stack([to_pixels(center_crop(image, self.size_px), self.size_px, "squash") for image in images])
        with in_use(self.network, self.device, self.offload) as network:
            return network(pixels.to(self.device, self.dtype), tokens.input_ids, tokens.attention_mask).cpu()


def center_crop(image: Image.Image, size_px: int) -> Image.Image:
    """Resize the shorter side to `size_px` (bicubic), and cut out the middle, rounded as torchvision does."""
    image = image.convert("RGB")
    width, height = (int(size_px * side / min(image.size)) for side in image.size)
    left, top = round((width - size_px) / 2), round((height - size_px) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size_px, top + size_px))
