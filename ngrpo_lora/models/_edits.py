"""What families have in common that start from a source picture and guide by two passes over one text encoding each."""

from __future__ import annotations

from torch import Tensor

from ngrpo_lora.models._base import BaseFamily
from ngrpo_lora.types import TextEmbeds

NEGATIVE = "negative_"
"""Before the names of a conditioning's tensors: those of the negative prompt."""


class SourceFamily(BaseFamily):
    """Keeps the negative prompt's states in each prompt's row, beside its source; `BaseFamily` documents its members.

    It stands before the family that it changes: `class ImageToVideo(SourceFamily, Family)`.
    """

    edits = True

    def encode_texts(self, prompt: str) -> dict[str, Tensor]:
        """Encode one prompt, and once for all of them the negative one, where it guides."""
        found = self.encode_alone(prompt)
        if self.guided:
            if self.negative is None:
                self.negative = TextEmbeds(self.encode_alone(self.config.negative_prompt))
            found |= {f"{NEGATIVE}{name}": tensor for name, tensor in self.negative.tensors.items()}
        return found

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the states of both prompts, if there are two passes, for a prompt of `tokens` tokens."""
        shapes = super().text_shapes(tokens)
        return shapes | ({f"{NEGATIVE}{name}": shape for name, shape in shapes.items()} if self.guided else {})

    def without_prompt(self, text: TextEmbeds) -> TextEmbeds:
        """The negative prompt in each row, and the row's own source."""
        own = text.tensors
        kept = (name for name in own if not name.startswith(NEGATIVE))
        return TextEmbeds({name: own.get(f"{NEGATIVE}{name}", own[name]) for name in kept})
