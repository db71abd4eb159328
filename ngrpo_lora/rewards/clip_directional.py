"""Directional CLIP similarity, whether a picture has changed as its caption has: the cosine of the two changes.

The changes are those of CLIP embeddings of length 1: of the source picture to the edited one, and of the caption of the
one to the caption of the other, `source_caption` and `target_caption` in the metadata. In [-1, 1]; 0 where a picture or
a caption has not changed. Source: StyleGAN-NADA (arXiv 2108.00946), section 4.1; InstructPix2Pix (arXiv 2211.09800)
measures edits with it. The network, its licence and its memory are those of `clip_score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ngrpo_lora.config.rewards.clip_directional import Config
from ngrpo_lora.errors import UserError
from ngrpo_lora.rewards._clip import load_clip
from ngrpo_lora.rewards._edits import source_of
from ngrpo_lora.rewards.clip_score import resize_of

CAPTIONS = ("source_caption", "target_caption")
NEEDS_SOURCE = True
"""Each picture is judged beside its source; without one there is no score."""


class Reward:
    """Directional CLIP similarity: the cosine of a picture's change and its caption's, (B,) float32 in [-1, 1]."""

    def __init__(self, config: Config, device: str):
        self.config, self.clip = config, load_clip(config, device)
        self.resize: Literal["crop", "squash"] = resize_of(config)

    def __call__(self, images: Sequence[Image.Image], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """(B,) float32, the cosine of each picture's change and its caption's; UserError where one of these lacks."""
        for row in metadata:
            source_of(self.config.key, row)
            check_metadata(row)
        before = self.clip.image_embeds([row["source"] for row in metadata], self.resize)
        after = self.clip.image_embeds(images, self.resize)
        source, target = (self.clip.text_embeds([row[caption] for row in metadata]) for caption in CAPTIONS)
        return F.cosine_similarity(after - before, target - source)


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise UserError unless the metadata of a prompt hold both captions."""
    if lacking := [name for name in CAPTIONS if not isinstance(metadata.get(name), str)]:
        raise UserError(
            f"reward clip_directional needs the columns {' and '.join(CAPTIONS)} in the prompts, texts that say what "
            f"the picture shows before and after the edit, got no {' and no '.join(lacking)}; add what is missing"
        )
