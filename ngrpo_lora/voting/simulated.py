"""A voter whose taste is known: it looks at a group as a person would, and is wrong as often as it is told to be."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

__all__ = ["TASTES", "Voter", "is_large", "is_warm", "large", "vote_at", "warm"]

POLL_S, PATIENCE_S = 0.05, 60

SATURATED = 60
"""By how many of 255 levels a pixel's channels differ where an object of the embedded world is, and no background."""


def warm(image: Image.Image) -> float:
    """The share of an image's coloured pixels that are red, orange or yellow, in [0, 1]; 0 without any."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    colored = np.ptp(pixels, axis=2) > SATURATED
    return float((pixels[..., 0] > pixels[..., 2])[colored].mean()) if colored.any() else 0.0


def large(image: Image.Image) -> float:
    """The share of an image's pixels that are coloured, in [0, 1]."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return float((np.ptp(pixels, axis=2) > SATURATED).mean())


def is_warm(image: Image.Image) -> float:
    """1 where more than half of an image's coloured pixels are warm, else 0."""
    return float(warm(image) > 0.5)


def is_large(image: Image.Image) -> float:
    """1 where more than an eighth of an image is coloured, else 0."""
    return float(large(image) > 0.125)


TASTES: dict[str, Callable[[Image.Image], float]] = {"warm": warm, "large": large}


class Voter:
    """Says which picture of a group is the best and which the worst, and is wrong with a known probability."""

    def __init__(self, taste: Callable[[Image.Image], float], wrong: float, seed: int):
        """`wrong`: the probability of each of its words that it names another picture, any of them alike."""
        self.taste, self.wrong, self.random = taste, wrong, np.random.default_rng(seed)

    def order(self, images: Sequence[Image.Image]) -> list[list[int]]:
        """The tiers of a group: the best, those between, the worst."""
        worths = np.array([self.taste(image) for image in images]) + 1e-6 * self.random.random(len(images))
        best = self.said(int(worths.argmax()), range(len(images)))
        others = [number for number in range(len(images)) if number != best]
        worst = self.said(min(others, key=worths.__getitem__), others)
        return [tier for tier in ([best], [n for n in others if n != worst], [worst]) if tier]

    def said(self, meant: int, among: Sequence[int]) -> int:
        """The picture that is meant, or by mistake another one."""
        others = [number for number in among if number != meant]
        return int(self.random.choice(others)) if others and self.random.random() < self.wrong else meant


def vote_at(address: str, voter: Voter, should_stop: Callable[[], bool]) -> int:
    """Vote at a page as a browser does, from when it is there until it is gone or `should_stop`; how often it voted."""
    import requests

    cast = 0
    with requests.Session() as session:
        session.trust_env = False  # no proxy stands between this machine and itself
        while not should_stop():
            try:
                group = session.get(f"{address}state", timeout=PATIENCE_S).json()["group"]
                if group is not None:
                    found = [
                        session.get(f"{address}pictures/{name}.png", timeout=PATIENCE_S) for name in group["pictures"]
                    ]
                    images = [Image.open(io.BytesIO(picture.content)) for picture in found]
                    ballot = {"group": group["name"], "said": "order", "orders": [voter.order(images)]}
                    cast += session.post(f"{address}ballot", json=ballot, timeout=PATIENCE_S).ok
                    continue
            except requests.Timeout:  # of a machine that is busy
                continue
            except (requests.ConnectionError, requests.JSONDecodeError):  # it is gone, from behind a proxy too
                if cast:
                    return cast
            time.sleep(POLL_S)
    return cast
