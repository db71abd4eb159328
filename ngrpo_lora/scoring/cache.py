"""Scores that are kept on disk, so that a picture is not judged again in the next evaluation."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ngrpo_lora import registry
from ngrpo_lora.config import RewardConfig
from ngrpo_lora.types import Samples

__all__ = ["ScoreCache"]


class ScoreCache:
    """Scores by image, prompt and reward in an SQLite file; a score that failed is not kept."""

    def __init__(self, path: Path):
        self.path = path
        with self.connect() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL)")

    def connect(self) -> sqlite3.Connection:
        """Open a connection to the file; it must stay in the thread that opened it."""
        return sqlite3.connect(self.path, timeout=60)

    def keys(self, config: RewardConfig, samples: Samples) -> list[str]:
        """SHA-256 of each image's pixels, prompt and metadata, the reward's settings, and the source of a function."""
        own = config.model_dump(mode="json", exclude={"weight", "label", "clip", "batch_size", "timeout_s"})
        source = registry.source_digest(config.name) if ":" in config.name else ""
        keys = []
        for image, prompt, metadata in zip(samples.images, samples.prompts, samples.metadata, strict=True):
            what = [own, source, image.mode, image.size, prompt, metadata]
            digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=_text).encode())
            digest.update(image.tobytes())
            keys.append(digest.hexdigest())
        return keys

    def read(self, keys: Sequence[str]) -> dict[str, float]:
        """Cached scores by key, without the keys that are not in the cache."""
        with self.connect() as connection:
            rows = (connection.execute("SELECT key, score FROM scores WHERE key = ?", [k]).fetchone() for k in keys)
            return dict(row for row in rows if row is not None)

    def write(self, scores: dict[str, float]) -> None:
        """Store scores by key; those that are not finite are left out."""
        kept = [(key, score) for key, score in scores.items() if abs(score) < float("inf")]
        with self.connect() as connection:
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", kept)


def _text(value: Any) -> str:
    """What JSON cannot hold as text: a picture by its pixels, for two of them may have one name and place in memory."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return str(value)
