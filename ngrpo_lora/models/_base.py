"""The contract between the trainer and a model family."""

from __future__ import annotations

from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from ngrpo_lora.config import ModelConfig
from ngrpo_lora.types import TextEmbeds


class Family(Protocol):
    """One flow model behind a few verbs. Latents are unpacked (B, C, H, W) float32, noise at sigma 1."""

    transformer: Any
    """The diffusers model (an nn.Module) that velocities come from and the adapter is put on."""

    latent_shape: tuple[int, ...]
    """(C, H, W) at the configured size."""

    architecture: str
    """`modelspec.architecture` of the base, by which model managers find it."""

    kohya_version: str
    """`ss_base_model_version` of the base, for the same purpose."""

    settings: dict[str, float | int]
    """Resolved guidance, shift and sequence length, for the adapter's metadata."""

    def __init__(self, config: ModelConfig, device: str): ...

    def lora_targets(self, targets: str) -> tuple[list[str], list[str]]:
        """(suffixes to adapt, full names to leave out) of `lora.targets`."""
        ...

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """By name: each tokenizer and how many tokens of a prompt reach its encoder."""
        ...

    def encode(self, prompts: list[str]) -> TextEmbeds:
        """Prompts -> conditioning, no gradient."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor | float, text: TextEmbeds) -> Tensor:
        """(B, C, H, W), scalar or (B,), B rows -> velocity (B, C, H, W) float32, with gradient where enabled."""
        ...

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Clean latents (B, C, H, W) -> B RGB images, no gradient."""
        ...

    def load_adapter(self, path: str, strength: float) -> None:
        """Put an exported adapter on the model, by diffusers' own loader."""
        ...
