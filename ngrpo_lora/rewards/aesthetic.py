"""LAION's aesthetic score, how good an image looks whatever it shows: a head on the image embedding of CLIP ViT-L/14.

Source: github.com/christophschuhmann/improved-aesthetic-predictor (v2), file `sac+logos+ava1-l14-linearMSE.pth`; the
head of v1, github.com/LAION-AI/aesthetic-predictor, file `sa_0_4_vit_l_14_linear.pth`, works as well and is told from
v2 by its weights. v2 is 768-1024-128-64-16-1 without activations, v1 is 768-1, both on the embedding at length 1.
1 to 10, the scale of the ratings it was made from; nothing holds it there.
Weights: v1 and CLIP are MIT, v2's repository names no licence that we found; 429 M parameters, 0.9 GB of memory in
float16, shared with `clip_score`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ngrpo_lora.config.rewards.aesthetic import FILE, Config
from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards._clip import load_clip, read_weights

LAYERS = {"v1": [""], "v2": [f"layers.{index}." for index in (0, 2, 4, 6, 7)]}  # 1, 3 and 5 are dropout


class Reward:
    """LAION's aesthetic score of each image, (B,) float32, about 1 to 10."""

    def __init__(self, config: Config, device: str):
        self.head = load_head(config)
        self.clip = load_clip(config, device)
        width = self.head[0][0].shape[1]
        if width != self.clip.embed_dim:
            raise UserError(
                f"reward {config.key}: head must fit the embeddings of path, {self.clip.embed_dim} numbers for "
                f"{config.path!r}, got one for {width}; use the network that it was made for"
            )

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """(B,) float32, the head's score of each image."""
        states = self.clip.image_embeds(images, resize="crop")  # (B, 768)
        for weight, bias in self.head:
            states = F.linear(states, weight.to(states.device), bias.to(states.device))
        return states.squeeze(1)


def load_head(config: Config) -> list[tuple[Tensor, Tensor]]:
    """Read the head: weight and bias of each layer, float32.

    Raises:
        UserError: the file cannot be read, or is neither v1 nor v2.
    """
    state = read_weights(config, "head", config.head, FILE)
    for layers in LAYERS.values():
        if set(state) == {layer + kind for layer in layers for kind in ("weight", "bias")}:
            return [(state[layer + "weight"].float(), state[layer + "bias"].float()) for layer in layers]
    raise UserError(
        f"reward {config.key}: head must be LAION's linear head v1 or v2, got {config.head!r} with "
        f"{', '.join(sorted(state)[:5])}; download {FILE} of github.com/christophschuhmann/improved-aesthetic-predictor"
    )
