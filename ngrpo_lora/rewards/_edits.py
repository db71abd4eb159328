"""What rewards of edits share: the source picture of each prompt, and the verdicts of the embedded world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ngrpo_lora.errors import UserError
from ngrpo_lora.world.edit_verifier import Seen, look, verify_edit
from ngrpo_lora.world.edits import parse_edit
from ngrpo_lora.world.verifier import Verdict


def source_of(reward: str, metadata: Mapping[str, Any]) -> Image.Image:
    """The source picture of a prompt.

    Args:
        reward: name of the reward that asks, for the message.
    Raises:
        UserError: there is none.
    """
    source = metadata.get("source")
    if not isinstance(source, Image.Image):
        raise UserError(
            f"reward {reward} needs the source picture of every prompt, but there is none; name it in a column source "
            "of the prompts"
        )
    return source


def verdicts(
    reward: str, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> list[Verdict]:
    """The verdicts of B pictures, for rewards; equal sources, as of a group, are read once.

    Args:
        reward: its name, for messages.
    Raises:
        UserError: a prompt is no instruction of the world, or its source is missing or does not show what it names.
    """
    seen: dict[bytes, Seen] = {}
    judged = []
    for image, prompt, row in zip(images, prompts, metadata, strict=True):
        pixels = np.asarray(source_of(reward, row))
        try:
            edit, key = parse_edit(prompt), pixels.tobytes()
            seen[key] = seen[key] if key in seen else look(pixels)
            judged.append(verify_edit(np.asarray(image), seen[key], edit))
        except ValueError as error:
            raise UserError(f"reward {reward}: {error}; correct the prompt or its source, or leave it out") from None
    return judged
