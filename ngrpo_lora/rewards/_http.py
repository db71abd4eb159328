"""What the rewards that ask a server share: addresses in their settings, images as text."""

from __future__ import annotations

import base64
import io
from typing import Annotated

from PIL import Image
from pydantic import AfterValidator

__all__ = ["PROTOCOL", "TOKEN_ENV", "Url", "encode_png"]

PROTOCOL = 1  # of `ngrpo reward-server` and the reward `remote`
TOKEN_ENV = "NGRPO_REWARD_TOKEN"


def _check_url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError(f"must start with http:// or https://, got {value!r}")
    return value.rstrip("/")


Url = Annotated[str, AfterValidator(_check_url)]


def encode_png(image: Image.Image) -> str:
    """Base64 of the image as a PNG in RGB: the pixels without loss."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)  # 6, the default: 15% smaller, up to 4 times slower
    return base64.b64encode(buffer.getvalue()).decode()
