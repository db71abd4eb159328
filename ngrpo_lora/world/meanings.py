"""What prompts of the embedded worlds mean, whatever their wording: pictures of one meaning are alike."""

from __future__ import annotations

from ngrpo_lora.world.edits import parse_edit
from ngrpo_lora.world.scenes import parse

__all__ = ["meaning_of"]


def meaning_of(prompt: str) -> str:
    """What a prompt means, the same for all wordings of a scene or an edit; one that is neither means itself."""
    for read in (parse, parse_edit):
        try:
            return read(prompt).meaning
        except ValueError:
            continue
    return prompt
