"""Pictures of the graph as the sources of edits: what a prompt of a model that edits starts from."""

from __future__ import annotations

import io as bytes_io
from typing import Any

from torch import Tensor

from ngrpo_lora.errors import ConfigError
from ngrpo_lora.evaluation.ranking import each_its_own
from ngrpo_lora.prompts.files import Prompt
from ngrpo_lora.prompts.pictures import SourcePicture

from ._api import to_pictures


def with_sources(prompts: list[Prompt], source: Tensor | None) -> list[Prompt]:
    """Give every prompt its source: the only picture of an IMAGE (B, H, W, C), or one picture each.

    Raises:
        ConfigError: there is another number of pictures, or they are too small for sources.
    """
    if source is None:
        return prompts
    pictures = source_pictures(source)
    try:
        each = each_its_own(pictures, len(prompts), "source")
    except ConfigError:
        raise ConfigError(
            f"source must be one picture, or one for each of the {len(prompts)} prompts, got {len(pictures)}"
        ) from None
    return [prompt._replace(source=picture) for prompt, picture in zip(prompts, each, strict=True)]


def source_pictures(source: Tensor) -> list[SourcePicture]:
    """The pictures of an IMAGE (B, H, W, C) as sources.

    Raises:
        ConfigError: they are too small or too large for sources.
    """
    pictures = []
    for image in to_pictures(source):
        png = bytes_io.BytesIO()
        image.save(png, "PNG")
        pictures.append(SourcePicture(png.getvalue(), "source", "the input source"))
    try:
        pictures[0].load()  # all are of one size
    except ConfigError as error:
        raise ConfigError(f"source {error}") from None
    return pictures


def only_source(source: Tensor | None) -> SourcePicture | None:
    """The picture of an IMAGE (1, H, W, C) as a source; None where there is none.

    Raises:
        ConfigError: there are several, or it is too small for a source.
    """
    if source is None:
        return None
    pictures = source_pictures(source)
    if len(pictures) > 1:
        raise ConfigError(
            f"source must be one picture, as all that is compared has one prompt, got {len(pictures)}; take one of "
            "them with ImageFromBatch"
        )
    return pictures[0]


def check_reaches(positive: Any, latents: Tensor) -> None:
    """Make sure that pictures can be edits of a source: conditioning has a picture, or it is where drawing begins.

    Raises:
        ConfigError: there are but words, and latents are empty.
    """
    if latents.any() or any(is_picture(one) for _, others in positive for one in others.values()):
        return
    raise ConfigError(
        "source must be what the pictures are edited from, but positive has no picture and latent_image is empty; let "
        "ReferenceLatent, or what gives your model its picture, put it into positive, or disconnect source"
    )


def is_picture(value: Any) -> bool:
    """Whether a value of conditioning may be a picture, its latents or what a network has seen in it: not words."""
    if isinstance(value, list | tuple):
        return any(map(is_picture, value))
    return value.ndim > 3 if isinstance(value, Tensor) else not isinstance(value, str | int | float | None)


def check_edits(edits: bool, source: Tensor | None, model: str) -> None:
    """Make sure that a model that edits, or starts a video from a picture, has a source, and that no other has one.

    Raises:
        ConfigError: it has none, or one too many.
    """
    if edits and source is None:
        raise ConfigError(f"source must be connected for {model}, which starts from one; connect Load Image to it")
    if not edits and source is not None:
        raise ConfigError(
            f"source must be left unconnected for {model}, which draws from words alone; disconnect it, or load a "
            "model that edits, such as embedded-edit"
        )
