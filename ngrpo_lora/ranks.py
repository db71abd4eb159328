"""Which process this is, among those that a launcher has started: what its environment variables say."""

from __future__ import annotations

import os

__all__ = ["launched", "process_device"]


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def process_device(device: str) -> str:
    """Resolve `cuda` to this process's own GPU where a launcher started several; other devices stay as they are."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and launched() else device
