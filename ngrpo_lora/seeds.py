"""Seeds: every random number of a run is a function of its seed and of where it is used."""

from __future__ import annotations

import hashlib

from ngrpo_lora.errors import ConfigError

SEEDS = 2**64
"""How many seeds generators tell apart; each is below this number."""


def derive_seed(*labels: object) -> int:
    """A 63-bit seed from labels, the same in every process (SHA-256, not `hash`)."""
    digest = hashlib.sha256("\x1f".join(map(str, labels)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def consecutive_seeds(first: int, count: int, name: str = "--seed") -> range:
    """A seed and those that follow it.

    Args:
        name: what the user calls the first one, for the message.
    Raises:
        ConfigError: one of them is beyond what generators take.
    """
    if not 0 <= first <= SEEDS - count:
        raise ConfigError(f"{name} must be from 0 to {SEEDS - count}, for {count} seeds from there on, got {first}")
    return range(first, first + count)
