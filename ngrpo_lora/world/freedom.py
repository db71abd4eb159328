"""What captions of the embedded world leave open, and how much of it a model still uses.

A reward that holds a picture to its caption does not see whether every free star is red by now. These measures do; they
are of a set of pictures, and none of one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from PIL import Image
from scipy.spatial.distance import pdist

from ngrpo_lora.world.scenes import COLORS, SIZE_PX, parse
from ngrpo_lora.world.verifier import Floats, find_blobs, match, read_background, read_paint, to_channels

CELLS = 4  # of the board that `scenes.place` sets objects on

reads = parse
"""What reads a prompt: it raises ValueError for one that is no caption of the world."""

SQUARE = True
"""Pictures must be as high as wide."""


def freedom(images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
    """Measure how varied pictures are in what their captions leave open.

    An object is the blob that the verifier assigns to a promised one. Entropies are `entropy_bits` over all objects;
    each of `four stars` counts, although they share a colour.

    Args:
        images: N square RGB pictures.
        prompts: N captions of the world.
    Returns:
        hue_bits: entropy of the colours of objects whose caption names none, at most log2(6) = 2.585; about that of
            rendered pictures.
        place_bits: entropy of the quarters of the picture in which objects stand whose caption fixes no place, at most
            2; 2 of rendered pictures. Four objects fill the board, and so do not count.
        background_spread: standard deviation over pictures of the background's mean colour, the root of the mean
            variance of the three channels, of 255; 8.4 of rendered pictures.
        diversity: RMS difference of two pictures whose captions promise the same (`Scene.meaning`), averaged over the
            pairs of each promise and then over promises, of 255.
        What is found nowhere is left out: no free object, no pale background, no two pictures of one promise.
    Raises:
        ValueError: a prompt is not a caption of the world, or an image is not a square RGB picture.
    """
    scenes = [parse(prompt) for prompt in prompts]
    pictures = [to_channels(np.asarray(image)) for image in images]
    hues: list[str] = []
    places: list[tuple[bool, bool]] = []
    groups: dict[str, list[Floats]] = defaultdict(list)
    for scene, pixels in zip(scenes, pictures, strict=True):
        groups[scene.meaning].append(pixels.ravel())
        blobs = find_blobs(*read_paint(pixels))
        _, promised, matched = match(scene, blobs)
        for obj, (found, _) in zip((scene.objects[i] for i in promised), (blobs[i] for i in matched), strict=True):
            if obj.color is None:
                hues.append(found.color)
            if scene.relation is None and len(scene.objects) < CELLS:
                places.append((found.x_px + 0.5 > SIZE_PX / 2, found.y_px + 0.5 > SIZE_PX / 2))
    backgrounds = [rows.mean(1) for rows in map(read_background, pictures) if rows is not None]
    pairs = [pdist(np.stack(group)).mean() / math.sqrt(group[0].size) for group in groups.values() if len(group) > 1]
    measured: dict[str, float] = {}
    if hues:
        measured["hue_bits"] = entropy_bits(hues, len(COLORS))
    if places:
        measured["place_bits"] = entropy_bits(places, CELLS)
    if backgrounds:
        measured["background_spread"] = math.sqrt(np.var(backgrounds, axis=0).mean())
    if pairs:
        measured["diversity"] = float(np.mean(pairs))
    return measured


def entropy_bits(values: Iterable[Hashable], kinds: int) -> float:
    """The entropy in bits of the distribution that values were drawn from, with the Miller-Madow correction.

        H = -sum_k p_k log2 p_k + (K - 1) / (2 N ln 2)

    over the K kinds that occur among the N values, with their shares p_k: without its second term it is too low, by
    about that much, and most so for few values. It is held to log2(kinds), which is the most there can be.

    Source: Miller, Note on the bias of information estimates (1955).

    Args:
        values: N of them, at least one.
        kinds: how many different values there can be.
    """
    counts = np.array(list(Counter(values).values()))
    shares = counts / counts.sum()
    plain = -(shares * np.log2(shares)).sum()
    return min(float(plain + (len(counts) - 1) / (2 * counts.sum() * math.log(2))), math.log2(kinds))
