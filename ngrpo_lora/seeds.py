"""Seeds: every random number of a run is a function of its seed and of where it is used."""

from __future__ import annotations

import hashlib


def derive_seed(*labels: object) -> int:
    """A 63-bit seed from labels, the same in every process (SHA-256, not `hash`)."""
    digest = hashlib.sha256("\x1f".join(map(str, labels)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
