"""ImageReward's network, expressed with transformers' BLIP; imported when the reward is made, since it is heavy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

__all__ = ["ImageRewardNetwork", "from_checkpoint"]

# Mean and deviation of the scores of ImageReward's training images, which its scores are freed from.
MEAN, STD = 0.16717362830052426, 1.0333394966054072

# BLIP's own names -> transformers'. The projections belong to pre-training, the ids are no weights.
DROPPED = re.compile(r"blip\.(vision_proj|text_proj)\.|position_ids$")
RENAMES = (
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^vision\.cls_token", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (r"^vision\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^vision\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
)


class ImageRewardNetwork(nn.Module):
    """BLIP's text encoder with cross-attention to the image's states, and an MLP head on its first token's state."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig):
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = nn.Sequential(
            nn.Linear(text.hidden_size, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    @property
    def size_px(self) -> int:
        """Side in pixels of the square images that the network takes."""
        patch_px = self.vision.embeddings.patch_embedding.kernel_size[0]
        return patch_px * math.isqrt(self.vision.embeddings.position_embedding.shape[1] - 1)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (B,) float32 of pixels (B, 3, H, W) and tokens (B, L); the head must be float32."""
        image = self.vision(pixel_values=pixels).last_hidden_state  # (B, 1 + patches, D)
        states = self.text(input_ids, attention_mask, encoder_hidden_states=image).last_hidden_state  # (B, L, D)
        return (self.head(states[:, 0].float())[:, 0] - MEAN) / STD


def from_checkpoint(state: Mapping[str, Tensor]) -> ImageRewardNetwork:
    """Build the network from weights in ImageReward's layout; sizes are read from shapes, and all heads are 64 wide.

    Raises:
        ValueError: weights are missing, or there are others.
        RuntimeError: weights do not fit each other.
    """
    weights = {}
    for name, tensor in state.items():
        if not DROPPED.search(name):
            for old, new in RENAMES:
                name = re.sub(old, new, name)
            weights[name] = tensor
    try:
        network = ImageRewardNetwork(*architecture(weights))
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    keys = network.state_dict().keys() ^ weights.keys()
    if keys:
        what = "is missing" if min(keys) in network.state_dict() else "is not one of its weights"
        raise ValueError(f"{min(keys)} {what}, one of {len(keys)} such names")
    network.load_state_dict(weights)
    return network


def architecture(weights: Mapping[str, Tensor]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Configure both encoders by weight shapes; the rest is BLIP's: exact GELU, eps 1e-6 (image) and 1e-12 (text)."""
    patches = weights["vision.embeddings.patch_embedding.weight"]  # (D, 3, patch, patch)
    words = weights["text.embeddings.word_embeddings.weight"]  # (vocabulary, D)
    grid = math.isqrt(weights["vision.embeddings.position_embedding"].shape[1] - 1)
    vision = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=depth(weights, "vision.encoder.layers"),
        num_attention_heads=patches.shape[0] // 64,
        image_size=grid * patches.shape[-1],
        patch_size=patches.shape[-1],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=vision.hidden_size,
        intermediate_size=weights["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=depth(weights, "text.encoder.layer"),
        num_attention_heads=words.shape[1] // 64,
        max_position_embeddings=weights["text.embeddings.position_embeddings.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # gives the layers their cross-attention; attention stays bidirectional
    )
    return vision, text


def depth(weights: Mapping[str, Tensor], layers: str) -> int:
    """Number of layers whose weights have names that begin with `layers`, a dotted prefix."""
    return len({name.removeprefix(layers + ".").partition(".")[0] for name in weights if name.startswith(layers + ".")})
