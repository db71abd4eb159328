"""Two pages of a comparison, each one file that loads nothing else: side by side, and a blind vote.

Scripts and styles lie beside this file; pictures are embedded. A content security policy forbids every request.
"""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["ballots", "write"]

HERE = Path(__file__).parent
LOSSLESS_PX = 256  # pictures up to this size are embedded without loss


def write(results: dict[str, Any], folder: Path) -> None:
    """Write the pages `side_by_side.html` and `blind.html` into a folder.

    Args:
        results: what `results.json` holds; its pictures' files are relative to `folder`.
    """
    files = [file for picture in results["pictures"] for file in picture["files"].values()]
    files += [picture["source"] for picture in results["pictures"] if "source" in picture]  # of an edit
    images = {file: data_uri(folder / file) for file in files}
    title = f"{', '.join(results['labels'][1:])} against {results['labels'][0]}"
    _fill(folder / "side_by_side.html", title, results | {"images": images})
    _fill(folder / "blind.html", "Which picture is better?", ballots(results) | {"images": images})


def ballots(results: dict[str, Any]) -> dict[str, Any]:
    """Pairs of each adapter with the reference in random order, with the adapter on the left in half of them.

    The same comparison is shuffled the same way, so that a page that is written again goes on with its votes.
    """
    reference, *others = results["labels"]
    shuffle_seed, found = int(results["comparison"], 16), []
    for number, label in enumerate(others):
        rng = np.random.default_rng([shuffle_seed, number])
        order, flipped = (rng.permutation(len(results["pictures"])).tolist() for _ in range(2))
        pairs = []
        for row, position in zip(order, flipped, strict=True):
            picture, side = results["pictures"][row], ("left", "right")[position % 2]
            sides = {side: label, ("left", "right")[1 - position % 2]: reference}
            pair = {where: picture["files"][who] for where, who in sides.items()}
            pair |= {"source": picture["source"]} if "source" in picture else {}
            pairs.append(pair | {"prompt": picture["prompt"], "seed": picture["seed"], "side": side})
        found.append({"label": label, "reference": reference, "pairs": pairs})
    return {"comparison": results["comparison"], "shuffle_seed": shuffle_seed, "ballots": found}


def data_uri(path: Path, longest_px: int | None = None) -> str:
    """A picture as a `data:` URI in WebP, without loss up to LOSSLESS_PX; made smaller where `longest_px` is less."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        shown = image.convert("RGB")
    if longest_px is not None:
        shown.thumbnail((longest_px, longest_px))
    shown.save(buffer, "WEBP", quality=90, lossless=max(shown.size) <= LOSSLESS_PX)
    return webp_uri(buffer.getvalue())


def webp_uri(data: bytes) -> str:
    """The contents of a WebP file as a `data:` URI."""
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def _fill(path: Path, title: str, data: dict[str, Any]) -> None:
    """Put style, script and data into the template of the same name."""
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no prompt can end the script element
    template = Template((HERE / path.name).read_text(encoding="utf-8"))
    style, script = (HERE / name for name in ("style.css", f"{path.stem}.js"))
    filled = template.substitute(
        title=html.escape(title),
        style=style.read_text(encoding="utf-8"),
        script=script.read_text(encoding="utf-8"),
        data=text,
    )
    path.write_text(filled, encoding="utf-8")
