"""Pictures of the graph as the sources of edits: what a prompt of a model that edits starts from."""

from __future__ import annotations

import io as bytes_io

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
    pictures = []
    for image in to_pictures(source):
        png = bytes_io.BytesIO()
        image.save(png, "PNG")
        pictures.append(SourcePicture(png.getvalue(), "source", "the input source"))
    try:
        each = each_its_own(pictures, len(prompts), "source")
    except ConfigError:
        raise ConfigError(
            f"source must be one picture, or one for each of the {len(prompts)} prompts, got {len(pictures)}"
        ) from None
    return [prompt._replace(source=picture) for prompt, picture in zip(prompts, each, strict=True)]


def check_edits(edits: bool, source: Tensor | None, model: str) -> None:
    """Make sure that a model that edits has a source, and that no other has one.

    Raises:
        ConfigError: it has none, or one too many.
    """
    if edits and source is None:
        raise ConfigError(f"source must be connected for {model}, which edits pictures; connect Load Image to it")
    if not edits and source is not None:
        raise ConfigError(
            f"source must be left unconnected for {model}, which edits no pictures; disconnect it, or load a "
            "model that edits, such as embedded-edit"
        )
